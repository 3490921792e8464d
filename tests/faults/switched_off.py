"""What switches the defence of each row of the fault table off, and the test that must then fail.

A row that has no defence to switch off, such as "the same run twice", is given a fault of the kind that it must notice.
A defence that is an absence, such as "the source has nothing that runs code from files", is given the offence.
"""

from __future__ import annotations

from typing import NamedTuple


class Defence(NamedTuple):
    """A part of the source without which a fault does harm."""

    row: str
    file: str
    #: found once in ``file``
    text: str
    #: replaces the text, and so switches the defence off
    off: str
    #: in tests/faults, unless it names another folder; without brackets, with all parameters until one fails
    test: str
    #: whether the defence is against a hang, so that a test that does not end has failed
    hang: bool = False

    @property
    def node(self) -> str:
        """The test as pytest names it."""
        return self.test if self.test.startswith("tests/") else f"tests/faults/{self.test}"


PROCESSES = [
    Defence(
        "1",
        "moe/train/loop.py",
        'Cursor.restored(position["cursor"]) if "cursor" in position else Cursor(sequences)',
        "Cursor()",
        "test_nodes.py::test_one_node_recovers_from_a_kill_in_every_phase[0-7-data]",
    ),
    Defence(
        "2",
        "launch/train.py",
        'return lock.continues and (meeting.restarted or "TORCHELASTIC_RUN_ID" in os.environ)',
        "return False",
        "test_bad_input.py::test_a_run_that_torchrun_has_restarted_goes_on",
    ),
    Defence(
        "2",
        "launch/signals.py",
        "if may_restart(self.process, code) and not self.restarting():",
        "if may_restart(self.process, code):",
        "test_endings.py::test_a_run_that_torchrun_restarts_does_not_take_its_signal_for_the_users",
    ),
    Defence(
        "3",
        "launch/joining.py",
        "if seen is not None and token != tokens.get(rank):",
        "if seen is not None and rank not in tokens:",
        "test_start.py::test_a_restarted_rank_joins_whatever_the_store_still_holds",
    ),
    Defence(
        "4",
        "moe/checkpoint/store.py",
        """\
    write_durably(partial / MANIFEST, [encode(step, position, files)])
    remove(final)  # a step is saved twice only when the first one was found damaged
    partial.rename(final)
""",
        """\
    remove(final)
    partial.rename(final)
    write_durably(final / MANIFEST, [encode(step, position, files)])
""",
        "test_resume.py::test_a_kill_within_a_save_loses_no_older_checkpoint[manifest-0]",
    ),
    Defence(
        "5",
        "launch/failing.py",
        "self._report(code, self._ended(gone) if gone else line, self.process.rank == min(alive))",
        "self._report(code, line, self.process.rank == min(alive))",
        "test_processes.py::test_a_killed_rank_is_named[dispatch-0]",
    ),
    Defence(
        "6",
        "moe/health/pulse.py",
        "return int(max(signals))",
        "return signal",
        "test_processes.py::test_a_signal_to_one_rank_saves_on_all_and_loses_no_step[15]",
    ),
    Defence(
        "6",
        "moe/train/loop.py",
        "saves = last or stop or (",
        "saves = last or (",
        "test_processes.py::test_a_signal_to_one_rank_saves_on_all_and_loses_no_step[15]",
    ),
    Defence(
        "6",
        "launch/signals.py",
        "end_agent(code, tells=speaks)",
        "pass",
        "test_endings.py::test_a_signal_before_the_first_step_is_not_restarted",
    ),
    Defence(
        "7",
        "moe/health/heartbeat.py",
        "if stalled > max(self.limit(phase) for phase in (self.phase, *self._phases())):",
        "if False:",
        "test_processes.py::test_a_stopped_rank_is_named_and_killed",
        hang=True,
    ),
    Defence(
        "7",
        "moe/health/heartbeat.py",
        "silent = [rank for rank in range(self.world) if rank not in fresh]",
        "silent: list[int] = []",
        "test_processes.py::test_a_stopped_rank_is_named_and_killed",
        hang=True,
    ),
    Defence(
        "8",
        "moe/health/stragglers.py",
        "return sorted(slow, key=lambda rank: -busy_P[rank])",
        "return []",
        "test_processes.py::test_a_slow_rank_is_named_in_the_records",
    ),
    Defence(
        "9",
        "launch/failing.py",
        "if _is_lost(problem):",
        "if False:",
        "test_processes.py::test_the_rank_with_the_error_prints_it_once_and_first[1]",
    ),
]

CHECKPOINTS = [
    Defence(
        "10",
        "moe/checkpoint/writer.py",
        "if free is not None and free < SPARE * total:",
        "if False:",
        "test_save_faults.py::test_free_space_is_checked_before_anything_is_written[2400-False]",
    ),
    Defence(
        "10",
        "moe/checkpoint/files.py",
        "while block:\n                    block = block[stream.write(block) or 0 :]",
        "stream.write(block)",
        "test_save_faults.py::test_a_full_disk_loses_no_checkpoint",
    ),
    Defence(
        "10",
        "moe/checkpoint/saver.py",
        "_discard(writer)\n        raise failure",
        "raise failure",
        "test_save_faults.py::test_a_full_disk_loses_no_checkpoint",
    ),
    Defence(
        "11",
        "launch/train.py",
        'checkpoint.probe(run_dir / "checkpoints")',
        "pass",
        "test_save_faults.py::test_a_folder_that_cannot_be_written_ends_the_run_before_training[file]",
    ),
    Defence(
        "12",
        "moe/checkpoint/manifest.py",
        'if size != entry["bytes"]:',
        "if False:",
        "test_damaged_checkpoints.py::test_truncated_files_are_found",
    ),
    Defence(
        "13",
        "moe/checkpoint/manifest.py",
        'elif sha256(file) != entry["sha256"]:',
        "elif False:",
        "test_damaged_checkpoints.py::test_flipped_bits_of_files_are_found[20]",
    ),
    Defence(
        "13",
        "moe/checkpoint/manifest.py",
        "sealed = schema != SCHEMA or (_SEAL.search(content) is not None and seal(content) == content)",
        "sealed = True",
        "test_damaged_checkpoints.py::test_every_flipped_bit_of_a_manifest_is_found[97]",
    ),
    Defence(
        "14",
        "moe/checkpoint/manifest.py",
        "AttributeError, RecursionError) as error:",
        "AttributeError) as error:",
        "test_hostile_checkpoints.py::test_hostile_manifests[a million arrays]",
    ),
    Defence(
        "14",
        "launch/strict_yaml.py",
        "_check_keys(node)",
        "pass",
        "test_settings.py::test_hostile_yaml",
    ),
    Defence(
        "14",
        "moe/observe/metrics.py",
        "except (ValueError, RecursionError):",
        "except ValueError:",
        "test_terminal.py::test_hostile_metrics",
    ),
    Defence(
        "14",
        "moe/train/data/tokenizer.py",
        "self.vocab_size <= LARGEST_VOCABULARY",
        "True",
        "test_hostile_data.py::test_wrong_tokenizers[an id of 2^32 - 1]",
    ),
    Defence(
        "15",
        "moe/checkpoint/legacy.py",
        'fields = _fields(interpret(file.read_bytes(), _METADATA_NAMES), "Metadata")',
        'fields = __import__("pickle").loads(file.read_bytes())',
        "test_hostile_checkpoints.py::test_malicious_checkpoints_execute_nothing[.metadata with __reduce__]",
    ),
    Defence(
        "15",
        "moe/checkpoint/manifest.py",
        "if not pattern.fullmatch(name) or not is_plain(path / name):",
        "if not is_plain(path / name):",
        "test_hostile_checkpoints.py::test_malicious_checkpoints_execute_nothing[path with ..]",
    ),
    Defence(
        "15",
        "moe/checkpoint/manifest.py",
        "return not file.is_symlink() and file.is_file()",
        "return file.is_file()",
        "test_hostile_checkpoints.py::test_malicious_checkpoints_execute_nothing[shard that is a link]",
    ),
    Defence(
        "16",
        "moe/checkpoint/legacy.py",
        "import pickletools\n",
        "import pickle\nimport pickletools\n",
        "tests/test_architecture.py::test_the_house_keeps_its_rules",
    ),
    Defence(
        "17",
        "moe/checkpoint/logical.py",
        "in sorted(splits, key=lambda split: isinstance(split[0], _StridedShard)):",
        "in splits:",
        "test_reshard.py::test_uneven_parts_of_two_kinds_of_parallelism",
    ),
    Defence(
        "17",
        "moe/checkpoint/logical.py",
        "if value.dim() != 4 or _STACKED not in name:",
        "if True:",
        "test_reshard.py::test_a_run_resumes_on_another_mesh_in_the_same_bits",
    ),
    Defence(
        "18",
        "moe/checkpoint/logical.py",
        "begin[dim] += first",
        "begin[dim] += 0",
        "test_resume.py::test_10_steps_and_a_resume_and_10_steps_equal_20[ep 2]",
    ),
    Defence(
        "19",
        "moe/engines/torch.py",
        "restore_optimizer(self._trained(), self.optimizer, state)",
        "pass",
        "test_resume.py::test_10_steps_and_a_resume_and_10_steps_equal_20[one process]",
    ),
    Defence(
        "20",
        "moe/train/loop.py",
        'Cursor.restored(position["cursor"]) if "cursor" in position else Cursor(sequences)',
        "Cursor(sequences)",
        "test_health.py::test_another_global_batch_goes_on_where_the_last_one_stopped",
    ),
]

INPUT = [
    Defence(
        "21",
        "moe/train/config.py",
        "self._check_tokens(found)",
        "pass",
        "test_settings.py::test_settings_that_fail_in_the_first_step",
    ),
    Defence(
        "22",
        "launch/joining.py",
        "return disagreement({rank: seen.facts for rank, seen in ranks.items()})",
        "return None",
        "test_processes.py::test_ranks_with_other_options_are_named[changes0-words0]",
    ),
    Defence(
        "23",
        "moe/parallel/alike.py",
        "if found is not None and found[0] == 0:",
        "if False:",
        "test_processes.py::test_ranks_with_other_shapes_are_named",
    ),
    Defence(
        "24",
        "moe/engines/inputs.py",
        "return sums[0], sums[1]",
        'return counted * mesh["stage"].size, sums[1]',
        "tests/parallel/test_expert_parallel.py::test_equals_one_process[2-2-unequal-plain]",
    ),
    Defence(
        "25",
        "moe/collectives/rows.py",
        "payload[0].nbytes if len(payload) else 0",
        "payload[0].nbytes",
        "tests/parallel/test_expert_parallel.py::test_equals_one_process[2-2-zero-plain]",
    ),
    Defence(
        "26",
        "kernels/cpu/grouped_gemm.py",
        "dy.new_zeros(offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1])",
        "dy.new_full((offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1]), 7.0)",
        "tests/parallel/test_expert_parallel.py::test_every_token_on_one_experts_rank",
    ),
    Defence(
        "27",
        "moe/collectives/rows.py",
        "if len(sent) != axis.size or len(received) != axis.size or sum(sent) != rows.shape[0]:",
        "if False:",
        "tests/parallel/test_expert_parallel.py::test_split_that_does_not_fit_is_refused_before_the_exchange",
    ),
    Defence(
        "27",
        "moe/collectives/rows.py",
        "if len(sizes) != axis.size or sum(counted) != rows:",
        "if False:",
        "tests/parallel/test_dispatchers.py::test_sizes_that_do_not_fit_are_refused_before_anything_moves",
    ),
    Defence(
        "28",
        "launch/failing.py",
        "first = self._claim(code)",
        "first = None",
        "test_processes.py::test_collectives_in_another_order_are_named_once",
    ),
    Defence(
        "29",
        "moe/train/judge.py",
        "if sound < self._axis.size:",
        "if False:",
        "test_wrong_numbers.py::test_a_number_that_is_not_finite_on_one_rank[1]",
    ),
    Defence(
        "29",
        "moe/health/finite.py",
        "return bool(sum_over(finite_here(losses, norm).long(), axis).get() == axis.size)",
        "return bool(finite_here(losses, norm))",
        "test_health_of_ranks.py::test_finite_everywhere_is_the_same_answer_on_all_ranks",
    ),
    Defence(
        "30",
        "moe/train/judge.py",
        "if sound < self._axis.size:",
        "if sound < self._axis.size and self.window.losses:",
        "test_wrong_numbers.py::test_a_number_that_is_not_finite_on_one_rank[1]",
    ),
    Defence(
        "31",
        "moe/train/data/token_file.py",
        "if size < self._size:",
        "if False:",
        "test_hostile_data.py::test_a_token_file_that_changes_under_a_run[truncated]",
    ),
    Defence(
        "31",
        "moe/train/data/sources.py",
        "if chunk.max() < vocab_size and chunk.min() >= 0:",
        "if True:",
        "test_hostile_data.py::test_wrong_data[beyond 2^32]",
    ),
    Defence(
        "32",
        "kernels/grouped_gemm/__init__.py",
        "if rows.dim() != 2 or rows.dtype not in _DTYPES:",
        "if False:",
        "tests/kernels/test_product_inputs.py::test_wrong_inputs_raise_one_line",
    ),
    Defence(
        "32",
        "kernels/checks.py",
        "if least.item() < 0 or most.item() >= sources:",
        "if False:",
        "tests/kernels/test_product_inputs.py::test_a_wrong_index_raises_one_line_on_the_cpu",
    ),
    Defence(
        "33",
        "kernels/permute/triton_ops.py",
        "r_R = tl.program_id(0).to(tl.int64) * BR",
        "r_R = tl.program_id(0) * BR",
        "tests/kernels/test_far_addresses.py::test_case[permute]",
    ),
    Defence(
        "34",
        "moe/dispatch/budgeted.py",
        "if all(load.rows <= fits for load in loads):",
        "if True:",
        "test_memory_budget.py::test_a_collapsed_router_stays_within_its_budget[small]",
    ),
    Defence(
        "34",
        "moe/dispatch/budgeted.py",
        "if self.stops or any(",
        "if any(",
        "test_memory_budget.py::test_all_ranks_stop_alike[20-True]",
    ),
    Defence(
        "34",
        "launch/memory.py",
        "return reason if layer is None else ",
        "return reason if True else ",
        "test_memory_budget.py::test_running_out_of_memory_names_the_layer",
    ),
    Defence(
        "35",
        "moe/collectives/kept.py",
        "return kept.values[kept.next - 1]",
        "return make()",
        "tests/parallel/test_dispatchers.py::test_recomputation_that_keeps_exchanges_repeats_none[all_to_all]",
    ),
    Defence(
        "35",
        "moe/balance/balancer.py",
        "if visit.counted and not visit.ahead:",
        "if False:",
        "tests/moe/test_bias.py::test_evaluation_recomputation_and_counting_ahead_do_not_move_it",
    ),
    Defence(
        "35",
        "kernels/topk_gate/torch_ops.py",
        "best.append(left_TE.argmax(dim=-1, keepdim=True))",
        "best.append(left_TE.shape[1] - 1 - left_TE.flip(1).argmax(dim=-1, keepdim=True))",
        "tests/moe/test_router.py::test_ties_go_to_the_lower_index[1-torch]",
    ),
]

NUMBERS = [
    Defence(
        "36",
        "moe/balance/sums.py",
        "reduction = sum_over(torch.cat(parts), self.axis)",
        "reduction = sum_over(torch.cat(parts), LOCAL)",
        "tests/parallel/test_balance_matrix.py::test_equals_one_process[fsdp 2]",
    ),
    Defence(
        "37",
        "moe/balance/balancer.py",
        "gradient = sum(term.gradient * (term.coefficient * scale) for term in visit.terms)",
        "gradient = sum(term.gradient * 0.0 for term in visit.terms)",
        "tests/moe/test_balance_scopes.py::test_several_losses_add_up_each_with_its_coefficient",
    ),
    Defence(
        "38",
        "moe/engines/reduce.py",
        'return "" if sharded else "edp"',
        'return ""',
        "tests/parallel/test_parity.py::test_equals_one_process[dp 4, ep 2, recompute]",
    ),
    Defence(
        "38",
        "moe/parallel/grad_norm.py",
        "for group in groups:",
        "for group in ():",
        "tests/parallel/test_parity.py::test_equals_one_process[dp 2, etp 2]",
    ),
    Defence(
        "39",
        "moe/routing/router.py",
        "if before is not None and self.bias_E is not None and self.bias_E.dtype != before.dtype:",
        "if False:",
        "tests/moe/test_router.py::test_bias_is_saved_when_used_and_stays_in_fp32",
    ),
    Defence(
        "39",
        "moe/engines/torch.py",
        "return {name: p.detach() for name, p in self.parameters.items()} | biases",
        "return {name: p.detach() for name, p in self.parameters.items()}",
        "test_resume.py::test_10_steps_and_a_resume_and_10_steps_equal_20[one process]",
    ),
    Defence(
        "40",
        "moe/health/replicas.py",
        "if not different:",
        "if True:",
        "test_health_of_ranks.py::test_a_flipped_bit_in_any_copy_is_found_and_named[dp]",
    ),
    Defence(
        "40",
        "moe/train/loop.py",
        "if config.health.replicas_every and (saves or ",
        "if config.health.replicas_every and (",
        "test_health_of_ranks.py::test_copies_are_compared_before_every_save",
    ),
    Defence(
        "41",
        "moe/train/replay.py",
        "if any(of_any):",
        "if False:",
        "test_health_of_ranks.py::test_replay_names_the_rank_that_calculates_wrongly",
    ),
    Defence(
        "42",
        "moe/train/loop.py",
        "rate = learning_rate(config.optim, self.step, config.steps)",
        "rate = learning_rate(config.optim, self.step, config.steps) * (1 + 1e-3 * (time.perf_counter() % 1))",
        "test_wrong_numbers.py::test_the_same_run_twice_has_the_same_bits",
    ),
]

AROUND_A_SAVE = [
    Defence(
        "43",
        "moe/checkpoint/writer.py",
        "self._buffers[item.index].copy_(source, non_blocking=True)",
        "self._buffers[item.index] = source",
        "test_background_saves.py::test_the_values_saved_are_those_of_the_step",
    ),
    Defence(
        "44",
        "moe/checkpoint/retention.py",
        "and path != saved and self._is_valid(path):",
        "and path != saved:",
        "test_damaged_checkpoints.py::test_retention_counts_valid_checkpoints_only",
    ),
    Defence(
        "44",
        "moe/checkpoint/retention.py",
        'old += [path for path in abandoned if path.suffix == ".tmp"]',
        "old += []",
        "test_damaged_checkpoints.py::test_retention_counts_valid_checkpoints_only",
    ),
    Defence(
        "44",
        "moe/checkpoint/agreement.py",
        "why = _damaged(root / name, manifest, places, peers)",
        'why = ""',
        "test_damaged_checkpoints.py::test_the_newest_valid_checkpoint_is_chosen",
    ),
    Defence(
        "45",
        "launch/folder.py",
        "fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_start.py::test_a_second_job_is_refused_by_name",
    ),
    Defence(
        "45",
        "launch/folder.py",
        'if here and not exclusive and start_time(_number(before.get("pid"))) == before.get("process", ""):',
        "if False:",
        "test_start.py::test_without_flock_a_living_holder_is_still_found",
    ),
    Defence(
        "45",
        "launch/folder.py",
        "if not here and not self._abandoned():",
        "if False:",
        "test_start.py::test_the_lock_of_another_host_is_respected_while_it_is_renewed",
    ),
    Defence(
        "46",
        "moe/health/heartbeat.py",
        "import time\n",
        "import time as clock\n\n\nclass time:\n    monotonic = staticmethod(lambda: clock.time())\n\n\n",
        "test_endings.py::test_a_clock_that_jumps_changes_nothing",
    ),
    Defence(
        "46",
        "launch/output.py",
        'stream.reconfigure(errors="backslashreplace")',
        "pass",
        "test_terminal.py::test_a_finished_run_has_its_report[ascii]",
    ),
    Defence(
        "46",
        "moe/train/data/sources.py",
        "name = printable(self.domain)",
        "name = self.domain",
        "test_hostile_data.py::test_names_that_control_a_terminal_are_escaped_in_the_corpus",
    ),
    Defence(
        "46",
        "moe/checkpoint/writer.py",
        "self.folder.mkdir(parents=True)",
        "self.folder.mkdir(parents=True)\n        self.folder.chmod(0o777)",
        "test_save_faults.py::test_odd_paths",
    ),
    Defence(
        "47",
        "launch/joining.py",
        'busy = "EADDRINUSE" in str(problem) or "in use" in str(problem)',
        "busy = False",
        "test_start.py::test_a_busy_port_is_one_line",
    ),
    Defence(
        "47",
        "launch/joining.py",
        "_reach(address, port, limit_s)",
        "pass",
        "test_start.py::test_a_wrong_address_is_one_line",
    ),
    Defence(
        "47",
        "launch/joining.py",
        "if refusal is None and waited > limit_s:",
        "if False:",
        "test_start.py::test_missing_ranks_are_named",
        hang=True,
    ),
    Defence(
        "48",
        "launch/failing.py",
        "if _is_lost(problem):",
        "if False:",
        "test_processes.py::test_a_killed_rank_is_the_cause_although_another_holds_a_nan",
    ),
    Defence(
        "49",
        "moe/observe/metrics.py",
        "except OSError as error:\n            if not self._warned:",
        "except ZeroDivisionError as error:\n            if not self._warned:",
        "test_save_faults.py::test_metrics_that_cannot_be_written_do_not_end_the_run",
    ),
    Defence(
        "50",
        "moe/engines/torch.py",
        "restore_optimizer(self._trained(), self.optimizer, state)",
        "pass",
        "test_soak.py::test_many_random_faults_leave_no_trace",
    ),
]

NODES = [
    Defence(
        "51",
        "launch/joining.py",
        '"restarted": any(rank.restarts for rank in seen),',
        '"restarted": bool(seen[-1].restarts),',
        "test_start.py::test_nodes_may_have_restarted_different_numbers_of_times",
    ),
    Defence(
        "51",
        "launch/failing.py",
        "if self.killed() or bool(_within(PATIENCE_S, lambda: store.check(asked))):",
        "if self.killed():",
        "test_endings.py::test_torchrun_may_be_restarting_because_of_another_node[True]",
    ),
    Defence(
        "52",
        "launch/slurm/train.sbatch",
        "*) again=true ;;",
        "*) ;;",
        "test_cluster.py::test_the_slurm_job_is_requeued_at_three_points",
    ),
    Defence(
        "53",
        "moe/checkpoint/agreement.py",
        "if names != places[0][-1]:",
        "if False:",
        "test_damaged_checkpoints.py::test_nodes_that_see_different_folders_do_not_resume[0-_remove_newest]",
    ),
    Defence(
        "53",
        "moe/checkpoint/agreement.py",
        "seen = _appears(first, names[0].encode())",
        "seen = True",
        "test_save_faults.py::test_two_folders_of_the_same_name_end_the_run_before_training",
    ),
]

LIFE = [
    Defence(
        "54",
        "moe/train/contract.py",
        "if refused:",
        "if False:",
        "test_resume_contract.py::test_change_of_meaning_is_refused_and_can_be_allowed",
    ),
    Defence(
        "55",
        "moe/train/data/cursor.py",
        "new = [s for s in batch if s >= self.first]",
        "new = list(batch)",
        "test_health.py::test_batch_is_revisited_only_once_and_then_left_out",
    ),
    Defence(
        "56",
        "moe/train/judge.py",
        'elif self.config.spike != "ignore" and self.window.is_spike(loss, self.config.spike_sigmas):',
        "elif False:",
        "test_health_of_ranks.py::test_spike_of_one_rank_is_skipped_by_all",
    ),
    Defence(
        "57",
        "launch/signals.py",
        "ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)",
        "pass",
        "test_kill.py::test_ranks_end_with_their_torchrun",
        hang=True,
    ),
    Defence(
        "58",
        "launch/env.py",
        "if lacking:",
        "if False:",
        "test_start.py::test_a_stale_rank_does_not_train",
    ),
    Defence(
        "59",
        "launch/env.py",
        "if may_restart(process, code):",
        "if False:",
        "test_cluster.py::test_torchrun_does_not_retry_what_would_fail_again[wrong0-64]",
    ),
    Defence(
        "60",
        "moe/health/heartbeat.py",
        "LOOK_S = 0.05",
        "LOOK_S = 0.0001",
        "test_cost.py::test_watching_costs_little",
    ),
]

DEFENCES = [*PROCESSES, *CHECKPOINTS, *INPUT, *NUMBERS, *AROUND_A_SAVE, *NODES, *LIFE]
