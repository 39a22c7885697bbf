"""A decoder for tests that run decode rounds one by one."""

from torch import Tensor

from qwen35.cache import Cache
from qwen35.sampling import Sampling
from qwen35.speculative import Decoder
from reference.model import Model

GREEDY = Sampling()


def decoder(
    model: Model,
    cache: Cache,
    token: int,
    hidden: Tensor,
    depth: int,
    sampling: Sampling = GREEDY,
    stop: frozenset[int] = frozenset(),
) -> Decoder:
    """The reference's decoder after a prompt. No token ends the text unless it is in `stop`.

    token: the newest token, which the cache does not hold. hidden: the trunk's hidden state
    of the token before it, [1, 1, D].
    """
    return Decoder(
        model, cache, token=token, hidden=hidden, depth=depth, sampling=sampling, stop=stop
    )
