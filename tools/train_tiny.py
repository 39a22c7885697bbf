"""`python -m tools.train_tiny CORPUS DST`: train the embedded checkpoint, ten minutes on one GPU.

CORPUS is a folder with train.txt and heldout.txt, as tools/corpus.py writes it. The trunk runs the
reference's own mixers and norms. The parts of the reference that are too slow for a training batch
(products over few rows, a loop over experts) are replaced by the batched forms below.
tests/tools/test_train_tiny.py compares these with the reference. The MTP head is trained as a chain
of three drafts: the first starts from the trunk's hidden states, each later one from the hidden
states of the draft before. Each depth attends to the same keys as in drafting.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from qwen35.arguments import as_device
from qwen35.cache import Cache
from qwen35.cli import Parser, at_least_one, folder_name, output_folder, run
from qwen35.config import Config
from qwen35.errors import InputError
from reference.activation import wide
from reference.attention import GatedAttention
from reference.linear import Linear
from reference.model import Model
from reference.moe import SparseMoeBlock
from reference.rope import apply_rope, rope_table
from tools.training_text import SPECIAL, encode_corpus, train_tokenizer
from weights.storage import whole, write_whole

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attn_output_gate": True,
        "attention_bias": False,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "mamba_ssm_dtype": "float32",
        "num_experts": 32,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 128,
        "router_aux_loss_coef": 0.001,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
}

LONGER = 4  # times the length of a window, in the last steps

TEMPLATE = """\
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('the system message comes first') }}
    {%- endif %}
{%- endfor %}
{%- if ns.last_user < 0 %}{{ raise_exception('there is no user message') }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content | trim %}
    {%- if message.role == 'assistant' %}
        {#- what was thought in earlier turns is not repeated -#}
        {%- set content = content.split('</think>')[-1] | trim %}
        {%- set content = '<think>\\n\\n</think>\\n\\n' ~ content %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""


# --- the batched forms -------------------------------------------------------------------------------


class BatchedLinear(nn.Module):
    """The reference's Linear as one matrix product over all rows."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class DenseMoeBlock(nn.Module):
    """The reference's SparseMoeBlock as three large products that compute every expert for every
    row.

    `balance` is the load-balancing loss of the last forward. It is 1 if all experts are used
    equally.
    """

    def __init__(self, source: SparseMoeBlock) -> None:
        super().__init__()
        self.top_k = source.gate.top_k
        self.gate = BatchedLinear(source.gate.weight)
        self.shared_expert, self.shared_expert_gate = (
            source.shared_expert,
            source.shared_expert_gate,
        )
        experts: list[Any] = list(source.experts)
        self.gate_proj = nn.Parameter(torch.cat([e.gate_proj.weight.data for e in experts]))
        self.up_proj = nn.Parameter(torch.cat([e.up_proj.weight.data for e in experts]))
        self.down_proj = nn.Parameter(torch.cat([e.down_proj.weight.data for e in experts], dim=1))
        self.num_experts = len(experts)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        probabilities = wide(self.gate(x)).softmax(-1)  # [B, T, E]
        chosen, experts = probabilities.topk(self.top_k, dim=-1)
        weights = chosen / chosen.sum(-1, keepdim=True)
        routing = torch.zeros_like(probabilities).scatter(-1, experts, weights).to(x.dtype)
        load = (routing > 0).float().mean((0, 1)) / self.top_k  # [E]
        self.balance = self.num_experts * (load * probabilities.mean((0, 1))).sum()

        hidden = F.silu(F.linear(x, self.gate_proj)) * F.linear(x, self.up_proj)  # [B, T, E * I]
        scaled = hidden.unflatten(-1, (self.num_experts, -1)) * routing[..., None]
        routed = F.linear(scaled.flatten(-2), self.down_proj)
        return routed + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    def unpacked(self) -> dict[str, Tensor]:
        """The experts' weights by the names that a checkpoint has in the MTP layer: one tensor per
        matrix."""
        named = {
            "gate_proj": self.gate_proj.chunk(self.num_experts),
            "up_proj": self.up_proj.chunk(self.num_experts),
            "down_proj": self.down_proj.chunk(self.num_experts, dim=1),
        }
        return {
            f"experts.{e}.{name}.weight": part
            for name, parts in named.items()
            for e, part in enumerate(parts)
        }


def batched(model: Model) -> Model:
    """Replace the modules that are slow in a training batch, in place. Returns the model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SparseMoeBlock):
                setattr(module, name, DenseMoeBlock(child))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Linear:
                setattr(module, name, BatchedLinear(child.weight))
    return model


def chained_attention(
    attn: GatedAttention, x: Tensor, depth: int, past: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """The MTP layer's attention at draft `depth` (0 is the first), for all positions of a sequence
    at once.

    x [B, T, D]: row t belongs to the chain that starts at t, and is at position t + depth. Row t
    attends to the keys of depth 0 at positions up to t (`past[0]`), to one key of each later depth,
    which is that of its own chain (`past[d]`, row t), and to its own key. The new keys and values
    are appended to `past`. Returns [B, T, D].
    """
    B, T, _ = x.shape
    q_raw, gate = attn.q_proj(x).view(B, T, -1, 2 * attn.head_dim).chunk(2, dim=-1)
    k_raw = attn.k_proj(x).view(B, T, -1, attn.head_dim)
    v = attn.v_proj(x).view(B, T, -1, attn.head_dim).transpose(1, 2)  # [B, G, T, K]
    positions = torch.arange(depth, depth + T, device=x.device)
    cos, sin = rope_table(positions, attn.rotary_dim, attn.rope_theta, x.dtype)
    q = apply_rope(attn.q_norm(q_raw).transpose(1, 2), cos, sin)  # [B, H, T, K]
    k = apply_rope(attn.k_norm(k_raw).transpose(1, 2), cos, sin)
    shared = q.shape[1] // k.shape[1]
    past.append((k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)))  # [B, H, T, K]

    (first_k, first_v), *later = past
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    scores = (q @ first_k.transpose(2, 3)).masked_fill(future, -torch.inf)  # [B, H, T, T]
    own = [(q * key).sum(-1, keepdim=True) for key, _ in later]  # [B, H, T, 1] each
    weights = (
        (wide(torch.cat([scores, *own], dim=-1)) * attn.head_dim**-0.5).softmax(-1).to(x.dtype)
    )
    read = weights[..., :T] @ first_v
    for i, (_, value) in enumerate(later):
        read = read + weights[..., T + i : T + i + 1] * value
    return attn.o_proj((read.transpose(1, 2) * torch.sigmoid(gate)).reshape(B, T, -1))


def chained_mtp(model: Model, ids: Tensor, hidden: Tensor, depths: int) -> list[Tensor]:
    """Hidden states of the drafts of every chain. result[d][:, t] predicts token t + 2 + d.

    ids [B, T]; hidden [B, T, D] from the trunk; result[d] is [B, T - 1 - d, D].
    """
    assert model.mtp is not None
    mtp, layer = model.mtp, cast(Any, model.mtp.layers[0])
    states, results, past = hidden, [], []
    for depth in range(depths):
        length = ids.shape[1] - 1 - depth
        embeds = model.embed_tokens(ids[:, 1 + depth :])
        states = states[:, :length]
        past = [(k[:, :, :length], v[:, :, :length]) for k, v in past]
        both = (mtp.pre_fc_norm_embedding(embeds), mtp.pre_fc_norm_hidden(states))
        x = mtp.fc(torch.cat(both, dim=-1))
        x = x + chained_attention(layer.self_attn, layer.input_layernorm(x), depth, past)
        states = mtp.norm(x + layer.mlp(layer.post_attention_layernorm(x)))
        results.append(states)
    return results


# --- training ----------------------------------------------------------------------------------------


def initialise(model: Model, seed: int) -> None:
    """Initialise the parameters in place. Matrices are normal with std 0.02, or smaller if they
    write to the residual stream. Norms keep their identity."""
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * model.config.num_hidden_layers) ** -0.5
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.data.uniform_(1, 16, generator=generator).log_()
        elif name.endswith("dt_bias"):  # softplus(dt_bias) between 0.001 and 0.1, evenly in the log
            dt = torch.empty_like(p.data).uniform_(
                math.log(1e-3), math.log(0.1), generator=generator
            )
            p.data.copy_(dt.exp() + torch.log(-torch.expm1(-dt.exp())))
        elif name.endswith("conv1d.weight"):
            p.data.uniform_(-0.5, 0.5, generator=generator)
        elif p.dim() > 1:
            into_stream = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
            p.data.normal_(0, 0.02 * (depth_scale if into_stream else 1), generator=generator)


def losses(model: Model, ids: Tensor, depths: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """The next-token loss and one loss per draft depth, in nats per token, and the mean balance
    loss. ids [B, T]."""
    cache = Cache.empty(model.config, model.embed_tokens.weight.dtype, ids.device, ids.shape[0])
    hidden = model(ids, cache)  # [B, T, D]

    def loss(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(states).float().flatten(0, 1), targets.flatten())

    trunk = loss(hidden[:, :-1], ids[:, 1:])
    drafts = [
        loss(states[:, :-1], ids[:, 2 + d :])
        for d, states in enumerate(chained_mtp(model, ids, hidden, depths))
    ]
    blocks = [m for m in model.modules() if isinstance(m, DenseMoeBlock)]
    return trunk, drafts, torch.stack([b.balance for b in blocks]).mean()


class Losses(nn.Module):
    """`losses` as a module, so that `functional_call` can run it on bf16 copies of the weights."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, depths: int) -> tuple[Tensor, list[Tensor], Tensor]:
        return losses(self.model, ids, depths)


def low_precision(module: nn.Module) -> dict[str, Tensor]:
    """The parameters as in inference: matrices in bf16. Gradients flow to the float32 originals."""
    return {
        name: p.to(torch.bfloat16) if p.dim() > 1 else p for name, p in module.named_parameters()
    }


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 2% of the steps, then constant, then linear to 0 over the last
    40%."""
    return peak * min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.4 * steps))


def train(
    model: Model, data: Tensor, args: argparse.Namespace, log: list[dict[str, float]]
) -> None:
    """Train with AdamW on random windows. They are LONGER times as long in the last 15% of the steps.

    data [N] ids. `log` gets an entry every --log-every steps.
    """
    module = Losses(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=data.is_cuda,
    )
    generator = torch.Generator().manual_seed(args.seed)
    started = time.perf_counter()
    for step in range(args.steps):
        length = args.length if step < 0.85 * args.steps else LONGER * args.length
        batch = args.tokens // length
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator).to(data.device)
        ids = data[starts + torch.arange(length, device=data.device)].long()  # [B, T]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        trunk, drafts, balance = torch.func.functional_call(
            module, low_precision(module), (ids, args.depths)
        )
        total = trunk + 0.3 * torch.stack(drafts).mean() + 0.01 * balance
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % args.log_every == 0 or step == args.steps - 1:
            entry = {
                "step": step,
                "seconds": round(time.perf_counter() - started, 1),
                "loss": round(trunk.item(), 4),
                **{f"draft_{d + 1}": round(x.item(), 4) for d, x in enumerate(drafts)},
                "balance": round(balance.item(), 3),
            }
            log.append(entry)
            print(json.dumps(entry), flush=True)


@torch.no_grad()
def bits_per_byte(model: Model, ids: Tensor, size: int, window: int = 2048) -> float:
    """The cost of a text of `size` bytes, in bits per byte. Each window predicts `window` tokens,
    and begins with the last token of the one before. The first token of the text is not counted."""
    nats = 0.0
    module = Losses(model)
    for first in range(0, len(ids) - 1, window):
        part = ids[None, first : first + window + 1].long()
        trunk, *_ = torch.func.functional_call(module, low_precision(module), (part, 1))
        nats += trunk.item() * (part.shape[1] - 1)
    return nats / math.log(2) / size


# --- the checkpoint ------------------------------------------------------------------------------------


def published(model: Model) -> dict[str, Tensor]:
    """The tensors as Qwen3.5's BF16 checkpoints have them: fused experts in the trunk, separate
    experts in the MTP layer. A_log and the delta nets' norms are float32."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, DenseMoeBlock):
            experts = module.unpacked()
            if path.startswith("mtp."):
                tensors |= {f"{path}.{name}": tensor for name, tensor in experts.items()}
                continue
            count = module.num_experts
            gate, up = (
                torch.stack([experts[f"experts.{e}.{n}_proj.weight"] for e in range(count)])
                for n in ("gate", "up")
            )
            tensors[f"{path}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)  # [E, 2I, D]
            tensors[f"{path}.experts.down_proj"] = torch.stack(
                [experts[f"experts.{e}.down_proj.weight"] for e in range(count)]
            )
    packed = {"gate_proj", "up_proj", "down_proj"}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in packed:
            tensors[name] = parameter.data

    def as_stored(name: str, tensor: Tensor) -> Tensor:
        exact = name.endswith((".A_log", ".linear_attn.norm.weight"))
        return tensor.detach().to("cpu", torch.float32 if exact else torch.bfloat16).contiguous()

    return {_file_name(name): as_stored(name, tensor) for name, tensor in sorted(tensors.items())}


def _file_name(name: str) -> str:
    return name if name.startswith(("mtp.", "lm_head.")) else f"model.language_model.{name}"


def save(model: Model, backend: Tokenizer, folder: Path) -> None:
    """Write all files of a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "model.safetensors") as unfinished:
        save_file(published(model), unfinished, metadata={"format": "pt"})
    write_whole(folder / "tokenizer.json", backend.to_str(pretty=True))
    end, _, turn_end, *_ = (backend.token_to_id(token) for token in SPECIAL)
    config = json.loads(json.dumps(CONFIG))
    config["text_config"]["eos_token_id"] = end
    advice = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": [turn_end, end],
        "pad_token_id": end,
        "bos_token_id": end,
    }
    documents = {
        "config.json": config,
        "generation_config.json": advice,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[0],
            "model_max_length": config["text_config"]["max_position_embeddings"],
        },
    }
    for name, document in documents.items():
        write_whole(folder / name, json.dumps(document, indent=2) + "\n")
    write_whole(folder / "chat_template.jinja", TEMPLATE)


def build_parser() -> Parser:
    about = "Train the embedded checkpoint, which takes ten minutes on one GPU."
    parser = Parser("python -m tools.train_tiny", about)
    add, corpus = parser.add_argument, "the folder that tools.corpus has written"
    add("corpus", type=folder_name, metavar="CORPUS", help=corpus)
    add("dst", type=output_folder, metavar="DST", help="the folder to write the checkpoint to")
    for name, kind, usual, what in (
        ("--steps", at_least_one, 1400, "train for N steps"),
        ("--tokens", at_least_one, 65536, "take N tokens in each step"),
        ("--length", at_least_one, 512, f"take windows of N tokens, {LONGER} x N at the end"),
        ("--lr", float, 3e-3, "let the learning rate rise to N"),
        ("--depths", at_least_one, 3, "train the MTP head to draft N tokens in a row"),
        ("--seed", int, 0, "draw initial weights and windows by the seed N"),
        ("--log-every", at_least_one, 50, "print a line every N steps"),
    ):
        add(name, type=kind, default=usual, metavar="N", help=f"{what} (default: {usual})")
    add("--device", default="cuda", metavar="D", help="train on D, as in cuda:1 (default: cuda)")
    return parser


def main(args: argparse.Namespace) -> int:
    least, longest = args.depths + 2, LONGER * args.length  # tokens of a window
    if not (least <= args.length and longest <= args.tokens):
        raise InputError(
            f"--length {args.length}; expected {least} to {args.tokens // LONGER}, because of --depths "
            f"{args.depths} and --tokens {args.tokens}"
        )
    if not 0 < args.lr < math.inf:
        raise InputError(f"--lr {args.lr}; expected a number above 0")
    device = as_device(args.device)
    for name in ("train.txt", "heldout.txt"):
        if not (args.corpus / name).is_file():
            raise InputError(f"{args.corpus / name}: no such file; tools/corpus.py writes it")
    started = time.perf_counter()
    padding = 48  # rows of the head beyond the tokenizer, as the published checkpoints have them
    vocab = CONFIG["text_config"]["vocab_size"] - padding
    backend = train_tokenizer(args.corpus / "train.txt", vocab)
    data = encode_corpus(args.corpus / "train.txt", backend, chat_share=0.08, seed=args.seed)
    if len(data) <= longest:
        raise InputError(
            f"{args.corpus / 'train.txt'}: {len(data)} tokens; expected more than {longest}, a window"
        )
    heldout = (args.corpus / "heldout.txt").read_text(encoding="utf-8")
    print(f"{len(data)} tokens, prepared in {time.perf_counter() - started:.0f} s", flush=True)

    torch.backends.cuda.matmul.allow_tf32 = True  # for the float32 products of the delta rule
    model = Model(Config.from_dict(CONFIG))
    initialise(model, args.seed)
    batched(model).to(device)
    log: list[dict[str, float]] = []
    train(model, data.to(device), args, log)

    held_ids = torch.tensor(backend.encode(heldout, add_special_tokens=False).ids)
    bpb = bits_per_byte(model, held_ids.to(device), len(heldout.encode()))
    print(json.dumps({"heldout_bits_per_byte": round(bpb, 4)}), flush=True)
    save(model, backend, args.dst)
    lines = [json.dumps(entry) for entry in [*log, {"heldout_bits_per_byte": bpb}]]
    write_whole(args.dst / "training_log.json", "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    run(build_parser(), main)
