"""`python -m tools.mutate`: change the code in small ways, and see if the tests fail.

mutmut (the extra `mutate`) mutates each module of MODULES in a copy of the checkout, and runs each
mutant against the tests of that module. A mutant that survives is printed as the two lines that
differ, unless mutants.json lists it as equivalent, with the reason why no test can detect it. A
mutant counts as killed if a test fails, or if the tests crash or run into mutmut's time limit.
--sample runs a random part of each module's mutants, always the same one with the same --seed.
--update writes the counts to mutants.json; docs/trust.md takes its table from there. An interrupted
run continues in the same --folder, and --again runs the survivors once more, against the tests as
they are now. A mutant takes one to twenty seconds. The exit status is 1 if a mutant survives that
mutants.json does not list, or if a chosen mutant could not be run.
"""

import argparse
import filecmp
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from qwen35.cli import Parser, at_least_one, output_folder, print_json, run, thread_count
from qwen35.errors import InputError
from qwen35.progress import Progress
from weights.storage import some, write_whole

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("mutants.json")
PACKAGES = ("qwen35", "reference", "weights", "fast", "tools")
# Looking for exceptions in garbage takes as long as the rest of a mutant's run.
PLUGINS = ("tools.mutate_order", "no:cacheprovider", "no:unraisableexception")
COUNTS = ("mutants", "run", "killed", "equivalent")
# What mutmut says of a mutant. Whatever is in neither list is alive, as "survived" and "no tests" are.
KILLED = ("killed", "timeout", "segfault", "caught by type check")
NOT_RUN = ("not checked", "check was interrupted by user")

# Prints the names of a module's mutants.
NAMES = """
import sys
from pathlib import Path
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name
path = Path(sys.argv[1])
for name in mutate_file_contents(str(path), path.read_text(encoding="utf-8")).mutant_names:
    print(get_mutant_name(path, name))
"""

# Modules, each with the tests that run against its mutants: files of the folder that mirrors the
# module's (or of another folder of tests/), and options of pytest that leave out slow ones.
MODULES = {
    "reference/activation.py": "test_activation",
    "reference/rope.py": "test_rope test_modules -k 'rope or 397B and not cached'",
    "reference/norm.py": "test_norm",
    "reference/linear.py": "test_linear",
    "reference/attention.py": (
        "test_attention test_modules qwen35/test_cache "
        "-k 'test_attention or test_module and 397B and Attention or plain_forward"
        " or full_forward and 397B'"
    ),
    "reference/deltanet.py": (
        "test_deltanet test_modules -k 'test_deltanet and not 500 or 397B and GatedDelta'"
    ),
    "reference/moe.py": "test_moe test_modules -k 'test_moe or 397B and SparseMoe'",
    "reference/layer.py": "test_modules -k 'test_logits and (397B or 4B) and 65'",
    "reference/model.py": "test_model test_modules -k 'test_model.py or test_logits and 397B and 65'",
    "reference/mtp.py": "test_mtp -k '397B or 27B and 64 or one_expert'",
    "reference/quantized.py": "test_quantized",
    "qwen35/cache.py": (
        "test_cache test_fp8_cache test_repr -k 'copy or copies or snapshots or grows or parts or line"
        " or steps or memory or fp8 and not chunks_hits and not folder and not load'"
    ),
    "qwen35/sampling.py": "test_sampling test_penalties",
    "qwen35/speculative.py": "test_rounds",
    "qwen35/generation.py": (
        "test_generation test_step_generation test_repr -k 'generation or completion'"
    ),
    "qwen35/step_decoder.py": "test_step_rounds test_step_decoder",
    "qwen35/load.py": (
        "test_load test_memory test_defaults test_swap test_paths qwen35/parallel/test_model"
        " weights/test_checkpoint weights/test_checkpoint_refused weights/test_put_aside"
        " -k 'test_load or dtypes_of or own_dtype or gradients or named_with_both or judged"
        " or what_is_counted or test_defaults or embedded or missing_folder or out_of_reach"
        " or text_config or swaps_while_loading or hip_kernels_says"
        " or test_model and (share or converted or refused)"
        " or test_put_aside and (used or tied or head or frequencies) and not alone and not conversion'"
    ),
    "qwen35/swap.py": "test_swap test_user_file test_node_error",
    "qwen35/tokenizer_limits.py": "test_tokenizer_limits",
    "qwen35/prefix/cache.py": (
        "test_budget test_cache test_folder_budget test_folder_foreign qwen35/test_kept"
        " qwen35/parallel/test_prefix"
        " -k 'test_budget or interval or why or longest_unused or kept and store or goes_in or parallel'"
    ),
    "qwen35/prefix/folder.py": (
        "test_store test_folder test_folder_foreign "
        "-k 'test_store or not_its_own or of_any_kind or under_another or whole_again or link or later"
        " or stay'"
    ),
    "qwen35/prefix/keys.py": "test_keys test_folder_foreign -k 'test_keys or fingerprint'",
    "qwen35/prefix/store.py": "test_store",
    "qwen35/compare/diff.py": (
        "test_diff_rows test_diff_whole"
        " -k 'built_model or counterpart or bad_ids or trace_of or decode_pass or worst_element"
        " or in_a_state or passes_take or are_told or state_rows or test_tokens'"
    ),
    "qwen35/compare/judge.py": "test_judge",
    "qwen35/compare/trace.py": (
        "test_trace qwen35/test_repr qwen35/test_entry_points"
        " -k 'test_trace.py and not bad_input or test_repr and trace or entry_points and ids'"
    ),
    "qwen35/compare/trace_file.py": "test_trace_file",
    "weights/checkpoint.py": (
        "test_idle test_parts test_rank_folders test_checkpoint_refused test_unlisted test_ranks"
        " -k 'test_idle or test_parts or cut_anew or do_not_fit or test_unlisted or bad_tensors"
        " or grouped'"
    ),
    "weights/convert.py": (
        "test_convert_refused test_convert_killed"
        " -k 'refused and not rows_that or finished or outlived'"
    ),
    "weights/entry.py": (
        "test_entry test_dialects test_dialects_refused test_runtime_scales test_fused_fp8"
        " -k 'test_entry or entries or bad_mxfp4 or bad_fp8 or looks_like or reachable or scales_that"
        " or too_many or told_apart or without_experts or without_inv or inspect_counts'"
    ),
    "weights/expert_scales.py": "test_expert_scales",
    "weights/fp8.py": "test_fp8",
    "weights/hub.py": "test_hub_files",
    "weights/layout.py": "test_layout",
    "weights/mxfp4.py": "test_mxfp4",
    "weights/outline.py": "test_outline",
    "weights/output.py": "test_output",
    "weights/quantization.py": (
        "test_quantization test_convert test_convert_fp8"
        " -k 'test_quantization or amds or published and fused'"
    ),
    "weights/ranks.py": "test_rank_folders",
    "weights/rounding.py": "test_rounding",
    "weights/shard.py": "test_shard test_shard_cut -k 'not one_place'",
    "weights/source.py": "test_source",
    "weights/storage.py": "test_storage",
    "weights/verify.py": (
        "test_verify -k 'dry_run or verifies or tied or first_difference or damage"
        " or source_that_changed or own_format'"
    ),
    "weights/words.py": "test_words fast/test_mxfp4",
    "fast/allreduce.py": "test_allreduce",
    "fast/attention.py": (
        "test_attention test_forward test_layer test_rows"
        " -k 'other_head_counts or refused or parts3 or e4m3 and 0.01-8 or self_attn or six"
        " or test_rows or pieces_are'"
    ),
    "fast/catalogue.py": "test_catalogue",
    "fast/configs.py": "test_configs",
    "fast/deltanet.py": (
        "test_deltanet test_forward test_layer test_rows"
        " -k 'other_sizes or other_head or published or rejected or test_rows"
        " or slots or gradients or begins_where or refused or linear_attn or six'"
    ),
    "fast/graph.py": "test_graph test_step_launches -k 'test_graph or captured or a_pass_runs'",
    "fast/hip.py": "test_hip -k 'not sources_compile'",
    "fast/hip_compiler.py": "test_hip -k 'not sources_compile'",
    "fast/launch.py": "test_launch",
    "fast/layer.py": (
        "test_layer test_forward test_allreduce test_rows"
        " -k 'test_layer or test_forward or looked_up or test_rows'"
    ),
    "fast/linear.py": (
        "test_linear test_layer test_deltanet test_block_sizes"
        " -k 'test_linear or product or take_turns or six or picked or four_projections"
        " or test_deltanet and 27B'"
    ),
    "fast/moe.py": (
        "test_moe test_layer test_forward test_rows -k 'refused or swapp or device_decides or kept"
        " or codes or padded or shuffled or nearest or not_in_the_table or limits or twice and 0.01"
        " or divide and 384 or bf16_and or test_layer and (27B or six or gradients)"
        " or one_block or called_as or test_moe and gradients or test_rows'"
    ),
    "fast/moe_hip.py": (
        "test_moe_hip -k 'refused or sizes_of_slices or whole_block and not 1024-1024 or bytes_'"
    ),
    "fast/mtp.py": (
        "test_mtp test_step_launches test_prompt_launches"
        " -k 'test_mtp or own_tokens or ranks_with or test_prompt_launches'"
    ),
    "fast/prefill/attention.py": (
        "test_passes test_mixers"
        " -k 'test_passes or attentions_outputs or 27B or pieces3 or keys_are_read or e4m3'"
    ),
    "fast/prefill/deltanet.py": (
        "test_passes test_mixers"
        " -k 'test_passes or delta_nets_outputs and not 64 or other_sizes and not sizes2'"
    ),
    "fast/prefill/layer.py": "test_passes",
    "fast/prefill/linear.py": "test_passes test_moe -k 'test_passes or test_a_block or dense_layer'",
    "fast/prefill/moe.py": (
        "test_passes test_moe -k 'not one_expert and not several and not small_numbers'"
    ),
    "fast/prefill/span.py": "test_passes",
    "fast/prefill/tiles.py": "test_passes",
    "fast/prompt.py": "test_prompt_launches",
    "fast/router.py": (
        "test_router test_router_hip test_moe test_layer test_rows"
        " -k 'renormalised or ties_go or splits_do_not or called_as or itself or powers"
        " or (stream and not bits and 5) or refuse or six or test_rows'"
    ),
    "fast/shapes.py": "test_shapes",
    "fast/state.py": "test_state",
    "fast/step.py": "test_step_launches",
    "fast/target.py": "test_target",
    "tools/gfx950/access.py": "test_access",
    "tools/gfx950/arrivals.py": "test_waits test_memory",
    "tools/gfx950/assembly.py": (
        "test_assembly test_kernels test_emulator"
        " -k 'test_assembly or hot_loop_has or hot_loop_is_the_longest or parsing or arguments_lie"
        " or three_axes'"
    ),
    "tools/gfx950/converts.py": "test_converts",
    "tools/gfx950/effects.py": "test_effects -k 'not touches'",
    "tools/gfx950/emulator.py": (
        "test_emulator test_unwritten test_waits test_kernels"
        " -k 'test_emulator or test_unwritten or test_waits or quotes or without_end or sleep"
        " or not_known'"
    ),
    "tools/gfx950/flow.py": "test_flow test_waits test_unwritten",
    "tools/gfx950/formats.py": "test_formats",
    "tools/gfx950/lanes.py": (
        "test_lanes test_instructions -k 'test_lanes or vector_instructions or by_hand'"
    ),
    "tools/gfx950/matrix.py": "test_matrix",
    "tools/gfx950/memory.py": (
        "test_memory test_access test_waits test_kernels"
        " -k 'not test_kernels or overlapping or quotes'"
    ),
    "tools/gfx950/nans.py": "test_nans",
    "tools/gfx950/operands.py": "test_operands",
    "tools/gfx950/registry.py": "test_registry",
    "tools/gfx950/scalar.py": "test_instructions -k 'scalar_instructions or scalar_sources'",
    "tools/gfx950/target.py": (
        "test_target test_kernels"
        " -k 'test_target.py or needs_no_data or count_together or names_the_launch'"
    ),
    "tools/gfx950/unwritten.py": "test_unwritten",
    "tools/gfx950/vector.py": (
        "test_vector test_instructions -k 'test_vector.py or vector_instructions or by_hand'"
    ),
    "tools/gfx950/vector_converts.py": (
        "test_vector test_instructions -k 'test_vector.py or vector_instructions or by_hand'"
    ),
    "tools/gfx950/vector_ops.py": (
        "test_vector test_instructions -k 'test_vector.py or vector_instructions or by_hand'"
    ),
    "tools/gfx950/waits.py": "test_waits",
    "tools/gfx950/waves.py": "test_waves",
}


def build_parser() -> Parser:
    parser = Parser("python -m tools.mutate", __doc__ or "", computes=False)
    add = parser.add_argument
    add("--module", nargs="+", choices=MODULES, default=[*MODULES], metavar="FILE",
        help="mutate these modules (default: all, the rows of the table in docs/trust.md)")  # fmt: skip
    add("--folder", type=output_folder, required=True, metavar="DIR",
        help="copy the checkout into DIR, once for each module; a folder of an earlier run goes "
        "on")  # fmt: skip
    add("--sample", type=at_least_one, metavar="N",
        help="run N mutants of each module, chosen at random (default: all)")  # fmt: skip
    add("--seed", type=int, metavar="S", help="with --sample: choose by the seed S (default: 0)")
    add("--again", action="store_true",
        help="also run the mutants that survived an earlier run once more")  # fmt: skip
    add("--processes", type=thread_count, default=1, metavar="N",
        help="run N mutants at a time (default: 1)")  # fmt: skip
    add("--update", action="store_true", help=f"write the counts to {TABLE.name}")
    add("--json", action="store_true", help="print one JSON document")
    return parser


def selection(module: str) -> list[str]:
    """The tests of a module, as arguments of pytest."""
    here = Path(module).parent
    return [
        str(Path("tests", word if "/" in word else here / word).with_suffix(".py"))
        if re.fullmatch(r"[\w/]*test_\w+", word)
        else word
        for word in shlex.split(MODULES[module])
    ]


def prepare(module: str, folder: Path) -> None:
    """Copy the checkout into `folder`, or what has changed of it since then, with a mutmut
    configuration for one module."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise InputError(f"git ls-files in {ROOT}: {' '.join(listed.stderr.split())}")
    for name in filter(None, listed.stdout.split("\0")):
        copy = folder / name
        if not copy.exists() or not filecmp.cmp(ROOT / name, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    options = tomllib.loads(text)["tool"]["pytest"]["ini_options"]["addopts"]
    settings = {
        "source_paths": sorted({module.partition("/")[0]}),
        "only_mutate": [module],
        "also_copy": [*PACKAGES, "docs", "README.md", "CONTRIBUTING.md"],
        "pytest_add_cli_args": [f"-p{name}" for name in PLUGINS],
        "pytest_add_cli_args_test_selection": selection(module),
        # Each mutant's process is forked from one that has imported the tests, but has run none: what
        # the tests cache (compiled kernels, an oracle's results) would hide the change.
        "process_isolation": "forkserver",
    }
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    alone = options.replace("-n 2 --dist worksteal ", "")
    text = text.replace(json.dumps(options), json.dumps(alone))
    project.write_text(f"{text}\n[tool.mutmut]\n{lines}\n", encoding="utf-8")


def python(folder: Path, *arguments: str) -> str:
    """Run Python in a copy of the checkout. Returns its standard output. InputError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        what = "mutmut" if arguments[0] == "-m" else "the list of mutants"
        raise InputError(f"{what} in {folder}: {' '.join(last)}")
    return done.stdout


def mutmut(folder: Path, *arguments: str) -> str:
    """Run mutmut in a copy of the checkout. Returns its standard output. InputError if it fails."""
    return python(folder, "-m", "mutmut", *arguments)


def names(module: str, folder: Path) -> list[str]:
    """The names of all mutants of a module. InputError if mutmut is not installed."""
    if importlib.util.find_spec("mutmut") is None:
        raise InputError("mutmut is not installed; pip install -e '.[test,mutate]'")
    return python(folder, "-c", NAMES, module).split()


def outcomes(folder: Path) -> dict[str, str]:
    """What mutmut says of each mutant, by name; empty before the first run."""
    lines = mutmut(folder, "results", "--all", "true").splitlines()
    return dict(line.strip().rsplit(": ", 1) for line in lines if ": " in line)


def change(folder: Path, mutant: str) -> str:
    """The change of a mutant, as `- old line + new line`, without indents."""
    lines = mutmut(folder, "show", mutant).splitlines()
    changed = [line for line in lines if line[:1] in "-+" and line[:3] not in ("---", "+++")]
    return " ".join(f"{line[0]} {line[1:].strip()}" for line in changed)


def examine(module: str, args: argparse.Namespace, known: dict[str, str]) -> dict[str, Any]:
    """Mutate a module. Returns counts, the mutants that survive, as texts of `change`, and the names
    of those that could not be run.

    known: the equivalent mutants, with the reasons.
    """
    folder = args.folder / module.replace("/", ".")
    prepare(module, folder)
    every = names(module, folder)
    seed = f"{module} {args.seed}" if args.seed else module
    chosen = {*random.Random(seed).sample(every, len(every))[: args.sample]}
    wanted = [name for name in every if name in chosen]
    if args.again:  # mutmut would not ask again which functions a test calls
        (folder / "mutants/mutmut-stats.json").unlink(missing_ok=True)
    again = args.again
    for _ in range(2):  # mutmut forgets all results if the module's tests are others now
        before = outcomes(folder)
        states = {name: before.get(name, NOT_RUN[0]) for name in wanted}
        todo = [
            n for n, state in states.items() if state in NOT_RUN or (again and state not in KILLED)
        ]
        if todo:
            mutmut(folder, "run", "--max-children", str(args.processes), *todo)
        again = False
    after = outcomes(folder)
    not_run = [name for name in wanted if after.get(name, NOT_RUN[0]) in NOT_RUN]
    run = [name for name in wanted if name not in not_run]
    alive = [change(folder, name) for name in run if after[name] not in KILLED]
    return {
        "mutants": len(every),
        "run": len(run),
        "killed": len(run) - len(alive),
        "equivalent": sum(text in known for text in alive),
        "alive": [text for text in alive if text not in known],
        "not_run": not_run,
    }


def main(args: argparse.Namespace) -> int:
    if args.seed is not None and args.sample is None:
        raise InputError(f"--seed {args.seed} chooses the mutants of a --sample; none is given")
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    with Progress("modules", len(args.module)) as progress:
        for module in args.module:
            known = table.get(module, {}).get("equivalents", {})
            found[module] = examine(module, args, known)
            if args.update:
                counts = {n: found[module][n] for n in COUNTS}
                table[module] = counts | {"equivalents": known}
                write_whole(TABLE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
            progress.update()
    status = int(any(row["alive"] or row["not_run"] for row in found.values()))
    if args.json:
        print_json(found)
        return status
    print(f"{'module':28} {' '.join(f'{name:>10}' for name in (*COUNTS, 'alive'))}")
    for module, row in found.items():
        counts = [*(row[name] for name in COUNTS), len(row["alive"])]
        print(f"{module:28} {' '.join(f'{count:10}' for count in counts)}")
    for module, row in found.items():
        for text in row["alive"]:
            print(f"{module}: {text}")
        if left := row["not_run"]:
            print(f"{module}: not run: {some(left)}")
    return status


if __name__ == "__main__":
    run(build_parser(), main)
