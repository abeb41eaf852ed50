"""What undoes the repair of each fault, and the tests that fail on it.

A fault is brought back where its repair is, in today's code: on the commit before the repair, most of these tests would
end for want of a module that came later. `tests/faults/__main__.py` does so in a copy of the repository.
"""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """In `file`, `old`, which is there once, becomes `new`."""

    file: str
    old: str
    new: str


class Fault(NamedTuple):
    """`tests`: what pytest is told to run. `ends`: how it may end: with failed tests, in a loop, or by a signal."""

    name: str
    edits: tuple[Edit, ...]
    tests: str
    ends: str = "fails"


_STEP, _LOOP = "streamjax/training/run/step.py", "streamjax/training/run/loop.py"
_SESSION, _GENERATE = "streamjax/streaming/session.py", "streamjax/streaming/generate.py"
_TOKENIZER, _PACKING = "streamjax/data/text/hugging_face.py", "streamjax/data/packing.py"
_RUNNER = "streamjax/commands/shell/runner.py"
_TENSORS = "streamjax/models/files/safetensors_files.py"

FAULTS = [
    Fault(
        "accumulation weighs microbatches by cross-entropy's rule, whatever the objective",
        (
            Edit(_STEP, "total = objective.count(arrays)", "total = CrossEntropy().count(arrays)"),
            Edit(_STEP, "objective.count(part) / jnp", "CrossEntropy().count(part) / jnp"),
        ),
        "tests/training/run/test_accumulation.py -k test_microbatches_are_the_batch",
    ),
    Fault(
        "stop ids of config.json are not used",
        (Edit(_SESSION, "(*tokenizer.eos_ids, *model.config.eos_token_ids)", "(*tokenizer.eos_ids,)"),),
        "tests/streaming/test_session.py -k together_say_what_stops",
    ),
    Fault(
        "a line end under byte fallback is held back",
        (
            Edit(
                "streamjax/data/text/incremental_decoder.py",
                "return len(utf8.getstate()[0])",
                "return len(utf8.getstate()[0]) or bool(\n"
                "            self._held and self._tokenizer.token_bytes(self._held[-1]) is not None)",
            ),
        ),
        "tests/data/text/test_incremental_decoder.py -k test_a_line_end_comes_at_once",
    ),
    Fault(
        "each read of a text gets a space of its own",
        (Edit(_SESSION, "continues=self.has_text and not begins", "continues=False"),),
        "tests/streaming/test_session_text.py -k 'test_prompt_and_pieces or read_in_pieces'",
    ),
    Fault(
        "recall encodes prompt and answer apart",
        (
            Edit(
                "streamjax/data/recall/tasks.py",
                "    return both[:same], both[same:]\n",
                "    return asked, tokenizer.encode(question.answer)\n",
            ),
        ),
        "tests/evaluation/test_recall.py",
    ),
    Fault(
        "the stream encoder cuts at blank lines",
        (
            Edit(
                "streamjax/data/text/stream_encoder.py",
                "            settled = borders_of(self._tokenizer)"
                ".settle(text, self._lead(text), self._parse_special)\n"
                "            if settled.length:\n"
                "                return self._take(settled.ids, settled.length, settled.behind)\n",
                '            if (cut := text.rfind("\\n\\n") + 2) > 1:\n'
                "                return self._take(self._encode(text[:cut]), cut, text[:cut])\n",
            ),
        ),
        "tests/data/text/test_stream_encoder.py -k 'test_ids_do_not_depend and blank_lines'",
    ),
    Fault(
        "training rows begin with BOS where the tokenizer adds none",
        (
            Edit(
                _PACKING,
                "    begin = _bos(tokenizer) if bos_each_row else None",
                "    begin = tokenizer.bos_id if bos_each_row else None",
            ),
        ),
        "tests/data/test_packing.py -k test_rows_begin_as_a_stream_does",
    ),
    Fault(
        "a lone surrogate ends encode",
        (Edit(_TOKENIZER, '    try:\n        text.encode("ut', '    return text\n    try:\n        text.encode("ut'),),
        "tests/data/text/test_tokenizers.py -k test_lone_surrogates",
    ),
    Fault(
        "the repetition penalty sees this call's prompt only",
        (
            Edit(
                _GENERATE,
                "        state = state.noting_used(vocab)",
                "        state = dataclasses.replace(state, used=None).noting_used(vocab)",
            ),
        ),
        "tests/streaming/saving/test_saved_session.py tests/streaming/test_generate.py"
        " -k 'test_four_calls_with_a_penalty or test_a_penalty_meets'",
    ),
    Fault(
        "the repetition penalty's ids are not saved with a session",
        (
            Edit(
                "streamjax/streaming/saving/saved_streams.py",
                '    return restore_pytree(like.noting_used(arrays["used"][-1]), path)',
                '    held = restore_pytree(like.noting_used(arrays["used"][-1]), path)\n'
                "    return dataclasses.replace(held, used=jnp.zeros_like(held.used))",
            ),
        ),
        "tests/streaming/saving/test_saved_session.py -k test_four_calls_with_a_penalty",
    ),
    Fault(
        "a NaN weight is not noticed",
        (Edit("streamjax/streaming/scan.py", "    if not bool(finite.all()):", "    if False:"),),
        "tests/streaming/test_not_finite.py",
    ),
    Fault(
        "scores of a damaged model's heads are written",
        (
            Edit(
                "streamjax/commands/find_heads.py",
                "    if not all(bool(np.isfinite(score).all()) for score in scores):",
                "    if False:",
            ),
        ),
        "tests/commands/test_not_finite.py -k 'test_nothing_is_measured and scores'",
    ),
    Fault(
        "a budget is measured of a damaged model",
        (Edit("streamjax/streaming/compacting/measure_budget.py", "(damaged := ", "False and (damaged := "),),
        "tests/commands/test_not_finite.py -k 'test_nothing_is_measured and prefix_kv'",
    ),
    Fault(
        "a damaged model is trained",
        (Edit("streamjax/training/run/initial_state.py", "if damage := damaged_weights(model):", 'if damage := "":'),),
        "tests/training/run/test_loop.py -k test_a_damaged_model_is_not_trained",
    ),
    Fault(
        "a flipped bit of a checkpoint loads",
        (Edit("streamjax/checkpoints/manifests.py", "        if digest != found_digest:", "        if False:"),),
        "tests/checkpoints/test_damage.py -k flipped_bit",
    ),
    Fault(
        "documents without tokens hang the pipeline",
        (
            Edit(
                _PACKING,
                '            if len(row["targets"]):\n                return row',
                "            if True:\n                return row",
            ),
        ),
        "tests/data/test_bad_data.py -k without_tokens",
        "loops",
    ),
    Fault(
        "a backend that is not there is a traceback",
        (Edit(_RUNNER, "        require_device()\n", "        pass\n"),),
        "tests/commands/test_commands_as_processes.py -k test_a_backend_that_is_not_there",
    ),
    Fault(
        "a seed beyond 64 bits is a traceback",
        (Edit(_RUNNER, "_WHOLE = 2**63", "_WHOLE = 2**99"),),
        "tests/commands/shell/test_runner.py -k test_whole_numbers_fit",
    ),
    Fault(
        "memory that runs out is not told in words",
        (Edit(_RUNNER, 'case RuntimeError() if "RESOURCE_EXHAUSTED" in text:', "case RuntimeError() if False:"),),
        "tests/commands/shell/test_runner.py",
    ),
    Fault(
        "a tokenizer with more ids than the model is refused",
        (
            Edit(
                _TOKENIZER,
                "        largest = max(self._tokenizer.get_vocab(with_added_tokens=False)",
                "        return self.vocab_size\n"
                "        largest = max(self._tokenizer.get_vocab(with_added_tokens=False)",
            ),
        ),
        "tests/streaming/test_session_text.py -k the_model_lacks",
    ),
    Fault(
        "a pad token that the vocabulary lacks refuses the tokenizer",
        (
            Edit(
                _TOKENIZER,
                ' and key != "pad_token":\n',
                ':\n            raise ValueError(f"{self._file} has no token {token!r}")\n',
            ),
        ),
        "tests/data/text/test_tokenizers.py -k test_special_tokens_that_the",
    ),
    Fault(
        "control tokens that a user types are parsed",
        (
            Edit(
                "streamjax/data/text/chat_templates.py",
                "        if not parse_special and isinstance(tokenizer, HFTokenizer):",
                "        if False:",
            ),
        ),
        "tests/data/text/test_chat_templates.py -k test_what_is_typed_ends_no_turn",
    ),
    Fault(
        "control tokens in a text are parsed",
        (Edit(_SESSION, "parse_special=self.parse_special, continues=self.has_text", "continues=self.has_text"),),
        "tests/streaming/test_session_text.py -k test_what_a_user_types_is_text",
    ),
    Fault(
        "a .jsonl is trained on as text",
        (Edit("streamjax/data/file_kinds.py", "in (*_JSON_LINES, *_RECORDS, *_PACKED)", "in (*_RECORDS, *_PACKED)"),),
        "tests/data/test_bad_data.py -k test_files_that_are_no_text",
    ),
    Fault(
        "prompts of different lengths as lists end in a numpy error",
        (
            Edit(
                "streamjax/streaming/token_rows.py",
                "    if isinstance(tokens, np.ndarray | Array):\n        array",
                "    if True:\n        array",
            ),
        ),
        "tests/streaming/test_token_rows.py -k 'different_lengths or nothing_but_padding'",
    ),
    Fault(
        "harmless fields of config.json warn",
        (
            Edit(
                "streamjax/models/families/config_fields.py",
                "_model_name_or_path _from_model_config",
                "_from_model_config",
            ),
        ),
        "tests/models/families/test_configs.py -k test_what_transformers_writes",
    ),
    Fault(
        "decoding kernels refuse pages of tokens that are coded by themselves",
        (Edit("pallas_kernels/coded.py", "group=math.gcd(self.group, page))", "group=self.group)"),),
        "tests/streaming/test_kernel_decoding.py -k 'test_kernels_give and coded'",
    ),
    Fault(
        "weights are views of their file",
        (
            Edit(
                _TENSORS,
                "        values = np.empty((stop - start, *self.shape[1:]), DTYPES[self.code])\n",
                "        shape, place = (stop - start, *self.shape[1:]), self.offset + start * self.row_bytes\n"
                '        return np.memmap(self.file, DTYPES[self.code], "c", place, shape)\n'
                "        values = np.empty((stop - start, *self.shape[1:]), DTYPES[self.code])\n",
            ),
        ),
        "tests/models/files/test_damaged_folders.py -k does_not_reach",
        "dies",
    ),
    Fault(
        "a folder that is replaced is away for a moment",
        (
            Edit(
                "streamjax/checkpoints/replacing.py",
                "    elif _exchange(fresh, path):\n        shutil.rmtree(fresh, ignore_errors=True)\n    else:\n",
                "    else:\n        shutil.rmtree(path)\n        os.rename(fresh, path)\n        return\n",
            ),
        ),
        "tests/checkpoints/test_replacing.py -k test_a_save_that_is_killed",
    ),
    Fault(
        "weights that are not finite are saved and exported",
        (Edit(_LOOP, '            if not np.isfinite(found["param_norm"]):', "            if False:"),),
        "tests/training/run/test_loop.py -k test_weights_that_are_not_finite",
    ),
    Fault(
        "processes without a mesh train apart",
        (Edit(_LOOP, "    if count > 1 and config.mesh == MeshConfig():", "    if False:"),),
        "tests/training/run/test_loop.py -k test_processes_without_a_mesh",
    ),
    Fault(
        "two runs write into one workdir",
        (Edit("streamjax/training/run/workdir.py", "    if fcntl is None:\n        return\n", "    return\n"),),
        "tests/training/run/test_loop.py -k test_two_runs_in_one_workdir",
    ),
    Fault(
        "numbers out of range are accepted",
        (
            Edit(
                "streamjax/field_checks.py",
                "        return low and (value < self.high if self.below else value <= self.high)",
                "        return True",
            ),
        ),
        "tests/test_field_checks.py -k test_wrong_values_are_refused",
    ),
    Fault(
        "a config.json with more layers than tensors is built",
        (
            Edit(
                "streamjax/models/files/model_folders.py",
                "            if isinstance(value, int) and value > limit:",
                "            if False:",
            ),
        ),
        "tests/models/files/test_damaged_folders.py -k 'test_a_config_that_asks_for_more and num_layers and hf'",
        "loops",
    ),
    Fault(
        "a panic of the tokenizers library shows Rust's own lines",
        (
            Edit(
                "streamjax/data/text/tokenizer_files.py",
                "return guarded(file, what, without_panic_reports()(parse))",
                "return guarded(file, what, parse)",
            ),
        ),
        "tests/data/text/test_tokenizers.py -k 'test_damaged_files and normalizer'",
    ),
]
