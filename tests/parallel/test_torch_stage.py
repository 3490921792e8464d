"""Checks what moe/parallel/torch_stage.py assumes about torch against the source of the installed torch.

A torch that does not fit fails here with its version and the difference, before any number is wrong.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from contextlib import nullcontext
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules, stage

from equimoe.moe.parallel.torch_stage import TorchStage
from tests.helpers.fork import run_ranks

#: attributes of a stage that schedules read or set
ATTRIBUTES = {
    *("is_first", "is_last", "has_backward", "num_stages", "stage_index", "submod", "device", "output_chunks"),
    *("group", "group_rank", "group_size", "stage_index_to_group_rank", "args_recv_info", "act_send_info"),
}
#: attributes of torch's own preparation of stages; it runs no forward of ours, because shapes are given
PREPARATION = {
    *("_user_meta", "_inference_mode", "_is_same_rank", "_warmup_forward_vote", "_warmup_backward_result"),
    *("_pre_metadata_inference_backup", "p2p_per_edge", "_parent_group", "_p2p_edge_groups"),
}
#: torch methods that use only the module, and no state of micro-batches
OF_THE_MODULE = {"perform_reduce_grad", "start_gradient_reduction", "wait_for_gradient_reduction", "scale_grads"}
#: called only by ways to run schedules that we do not use
UNREACHED = {"_clear_unlaunched_fwd_recv", "_clear_unlaunched_bwd_recv"}
#: our calls of torch's backward: names of the arguments, and keys of the second one
BACKWARD = ["self", "backward_type", "bwd_kwargs", "last_backward"]
BACKWARD_KEYS = {"stage_output", "output_grads", "input_values", "param_groups"}
#: attributes of the stage that torch's methods of the module may use
OF_THE_STAGE = {"submod", "has_backward", "scale_grads", "_gradient_reduction_handle", *OF_THE_MODULE}


def is_stage(node: ast.expr) -> bool:
    """Return whether an expression in torch's schedules is a stage."""
    if isinstance(node, ast.Subscript):
        whole = node.value
        name = whole.id if isinstance(whole, ast.Name) else getattr(whole, "attr", "")
        return name in ("stages", "_stages", "pp_stages", "pipeline_stages", "stage_index_to_stage")
    return (isinstance(node, ast.Name) and node.id in ("stage", "st")) or getattr(node, "attr", "") == "_stage"


def misfits(source: str) -> list[str]:
    """Return everything that schedules do with a stage and :class:`TorchStage` does not support."""
    own, tree, found = vars(TorchStage), ast.parse(source), []
    known = ATTRIBUTES | PREPARATION | OF_THE_MODULE | UNREACHED | own.keys()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_stage(node.value) and node.attr not in known:
            found.append(f"line {node.lineno}: stage.{node.attr} is new")
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_stage(node.func.value)):
            continue
        if node.func.attr in own:
            try:
                named = {word.arg: None for word in node.keywords if word.arg is not None}
                inspect.signature(own[node.func.attr]).bind(None, *node.args, **named)
            except TypeError as error:
                found.append(f"line {node.lineno}: stage.{node.func.attr} is called with other arguments: {error}")
    return found


def of_torch(found: list[str]) -> str:
    return f"torch {torch.__version__} does not fit moe/parallel/torch_stage.py:\n" + "\n".join(found)


def test_schedules_ask_a_stage_for_what_it_has() -> None:
    found = misfits(Path(schedules.__file__).read_text())
    assert not found, of_torch(found)


def test_what_is_new_is_found() -> None:
    """Check the search itself, on lines that a later torch might have."""
    assert misfits("stage.fuse(1)") == ["line 1: stage.fuse is new"]
    assert misfits("self._stage.get_fwd_recv_ops(i)\nstages[0].is_first\nother.fuse(1)") == []
    (found,) = misfits("if True:\n    self._stages[0].get_fwd_recv_ops(i, early=True)")
    assert found.startswith("line 2: stage.get_fwd_recv_ops is called with other arguments: ")
    tree = ast.parse(Path(schedules.__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_stage(node.value)}
    assert {"forward_one_chunk", "backward_one_chunk", "get_bwd_send_ops", "set_local_fwd_input"} <= used


def test_torchs_own_methods_are_what_the_stage_builds_on() -> None:
    names = ("_prepare_forward_infra", "_prepare_backward_infra", "perform_reduce_grad", "clear_runtime_states")
    found = [f"PipelineStage.{name} is gone" for name in names if not hasattr(PipelineStage, name)]
    backward = PipelineStage.backward_maybe_with_nosync
    if list(inspect.signature(backward).parameters) != BACKWARD:
        found.append(f"backward_maybe_with_nosync takes other arguments: {inspect.signature(backward)}")
    source = inspect.getsource(backward)
    found += [f"backward_maybe_with_nosync does not use {key}" for key in BACKWARD_KEYS if f'"{key}"' not in source]
    for name in sorted(OF_THE_MODULE & set(dir(PipelineStage)) | {"backward_maybe_with_nosync"}):
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(PipelineStage, name))))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"}
        found += [f"{name} uses self.{attribute}" for attribute in sorted(used - OF_THE_STAGE)]
    by_hand = "set_manual_backward_finalization"
    if by_hand in inspect.getsource(stage) and not hasattr(FSDPModule, by_hand):
        found.append(f"FSDPModule.{by_hand} is gone")
    assert not found, of_torch(found)


def test_names_of_our_own_are_not_torchs() -> None:
    """Attributes of ours that torch also uses would silently be overwritten."""

    def script(rank: int, world: int) -> tuple[set[str], set[str]]:
        x = torch.empty(1, 2, 3, device="meta")
        plain = PipelineStage(torch.nn.Linear(3, 3), 0, 1, torch.device("cpu"), input_args=x, output_args=x)
        ids = torch.empty(1, 2, dtype=torch.int64, device="meta")
        ours = TorchStage(torch.nn.Linear(3, 3), 0, 1, torch.device("cpu"), None, ids, x, torch.no_grad, nullcontext)
        return set(vars(plain)), set(vars(ours)) - set(vars(plain))

    torchs, ours = run_ranks(script, 1)[0]
    assert ours == {"_hidden_BSD", "_precision", "_micro_batch", "_in_flight"}, of_torch(sorted(ours))
    helpers = {"_sends_output", "_buffer", "_op", "_check_hidden", "_backward"}
    assert helpers <= vars(TorchStage).keys()
    clash = [name for name in helpers if hasattr(PipelineStage, name) or name in torchs]
    assert not clash, of_torch([f"PipelineStage has a {name}, too" for name in clash])


def test_this_torch_is_one_of_those_declared() -> None:
    """The torch versions that we test must be those that we declare."""
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    (declared,) = re.findall(r'"torch([<>=][^"]+)"', setup)
    fits = SpecifierSet(declared).contains(torch.__version__, prereleases=True)
    assert fits, f"setup.py declares torch{declared}, and the tests run on {torch.__version__}"
