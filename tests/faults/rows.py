"""The fault table: what is injected in each row. Tests report the rows that they have seen hold, by these numbers."""

from __future__ import annotations

ROWS = {
    # processes
    "1": "a rank is killed, in every phase of a step; the resumed run ends in the same bits",
    "2": "a rank is killed under torchrun --max-restarts; the run recovers by itself",
    "3": "a rank is killed again during the restart",
    "4": "a rank is killed in the middle of a save",
    "5": "the first or the last rank is killed",
    "6": "SIGTERM or SIGINT (preemption)",
    "7": "a rank hangs in a collective",
    "8": "a rank is ten times slower than the others",
    "9": "a rank raises an error of its own",
    # checkpoints
    "10": "the disk is full during a save",
    "11": "the checkpoint folder cannot be written, or is missing",
    "12": "a shard is truncated",
    "13": "a bit is flipped in a shard or in the manifest",
    "14": "corrupt or hostile JSON and YAML",
    "15": "malicious pickles, paths and links in a checkpoint",
    "16": "the source uses something that runs code from files",
    "17": "the mesh differs at the resume",
    "18": "a checkpoint must hold every expert",
    "19": "a run is resumed on the same mesh: bits equal an uninterrupted run",
    "20": "the data are resumed in the middle of an epoch, at its end, with another batch or world",
    # input
    "21": "settings that do not fit together",
    "22": "a setting differs on one rank",
    "23": "model, dtype or shape differs on one rank",
    "24": "a rank has another number of tokens",
    "25": "a rank has no tokens",
    "26": "an expert, or all experts of a rank, get no tokens, or all of them",
    "27": "a receive split is tampered with",
    "28": "a rank calls another collective",
    "29": "NaN or infinity in input, logits, a weight, a gradient or the loss of one rank",
    "30": "NaN in the first step",
    "31": "bad data files",
    "32": "wrong dtype, shape, device or layout given to a public op",
    "33": "indices beyond 2^31",
    "34": "the routing collapses onto one expert, and memory is short",
    "35": "recomputation, and ties in the routing",
    # numbers
    "36": "the balance loss on any mesh, with unequal tokens, against one process",
    "37": "the balance loss is without effect",
    "38": "every gradient and the norm on any mesh, against one process",
    "39": "the expert bias across save and resume",
    "40": "a bit flips in one copy of a weight",
    "41": "a bit flips in an activation",
    "42": "the same run twice",
    # around a save
    "43": "the optimizer goes on while a checkpoint is written",
    "44": "abandoned folders, and a newest checkpoint that is damaged",
    "45": "two jobs use one run folder",
    "46": "clock, locale, umask, and odd paths",
    "47": "a busy port, a wrong address, missing ranks",
    "48": "one rank is killed while another one has the error",
    "49": "the metrics file cannot be written any more",
    "50": "a soak of random faults against an uninterrupted run",
    # more than one node
    "51": "two nodes: a killed rank, a killed or replaced agent, static and c10d rendezvous",
    "52": "a Slurm job is requeued; a Kubernetes pod is replaced",
    "53": "nodes see different folders",
    # the life of a run
    "54": "a resumed run changes what is trained",
    "55": "a skipped step is read again exactly once",
    "56": "a loss spike on one rank",
    "57": "ranks lose their agent",
    "58": "stale or malformed variables of a launcher",
    "59": "torchrun may restart, but the configuration is wrong or a number is not finite",
    "60": "nothing: what the checks cost",
}

#: rows that tests in other folders hold: the functions, with all their parameters but the slow ones
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "16": ("tests/test_architecture.py::test_the_house_keeps_its_rules",),
    "24": ("tests/parallel/test_expert_parallel.py::test_equals_one_process",),
    "25": ("tests/parallel/test_expert_parallel.py::test_equals_one_process",),
    "26": ("tests/parallel/test_expert_parallel.py::test_every_token_on_one_experts_rank",),
    "27": (
        "tests/parallel/test_expert_parallel.py::test_split_that_does_not_fit_is_refused_before_the_exchange",
        "tests/parallel/test_dispatchers.py::test_sizes_that_do_not_fit_are_refused_before_anything_moves",
    ),
    "32": ("tests/kernels/test_custom_ops.py", "tests/kernels/test_product_inputs.py"),
    "33": ("tests/kernels/test_far_addresses.py",),
    "35": (
        "tests/parallel/test_dispatchers.py::test_recomputation_that_keeps_exchanges_repeats_none",
        "tests/moe/test_bias.py::test_evaluation_recomputation_and_counting_ahead_do_not_move_it",
        "tests/moe/test_router.py::test_ties_go_to_the_lower_index",
    ),
    "36": ("tests/parallel/test_balance_matrix.py",),
    "37": ("tests/moe/test_balance_scopes.py::test_several_losses_add_up_each_with_its_coefficient",),
    "38": ("tests/parallel/test_parity.py",),
    "39": ("tests/moe/test_router.py::test_bias_is_saved_when_used_and_stays_in_fp32", "tests/moe/test_bias.py"),
}

#: rows that do not apply, and why
NOT_APPLICABLE: dict[str, str] = {}
