"""LLM: the offline API as a user meets it, and what it says where it cannot work."""

import json
import logging
import os
import random
import signal

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3NextForCausalLM

from hybridcache import LLM, SamplingParams
from hybridcache.device import choose_device, require_room
from hybridcache.errors import UserError
from hybridcache.llm import load_for_inference
from hybridcache.outputs import TextPieces
from hybridcache.workloads.byte_tokenizer import ByteTokenizer
from models.configs import shipped_config

WORDS = ["<unk>", "<end>", "memory", "is", "shared", "by", "states", "and", "tokens", "."]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny", cache_bytes=4 << 20, dtype="float64", device="cpu", max_tokens_per_step=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint with a word tokenizer, as Transformers saves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = shipped_config("tiny")
    config.vocab_size, config.num_hidden_layers, config.layer_types = 10, 4, config.layer_types[:4]
    config.bos_token_id = config.pad_token_id = None
    config.eos_token_id = 1
    torch.manual_seed(0)
    Qwen3NextForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return folder


def test_texts_in_texts_out(llm):
    prompts = ["The pool is", "héllo ✓"]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True), progress=False)
    for prompt, output in zip(prompts, outputs):
        assert output.prompt == prompt
        assert output.prompt_token_ids == list(prompt.encode())
        assert len(output.token_ids) == 5
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert output.finish_reason == "length"
        assert output.error is None
        assert 0 <= output.arrival_s < output.first_token_s < output.finish_s
        assert output.ttft_s == output.first_token_s - output.arrival_s
        assert output.tpot_s == pytest.approx((output.finish_s - output.first_token_s) / 4)
    assert not llm.strategy.residents
    assert llm.engine.sequences == []


def test_prompts_may_be_ids_and_may_stand_alone(llm, capsys):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    (text,) = llm.generate("ab", params)
    assert "generate" in capsys.readouterr().err  # the progress bar
    (ids,) = llm.generate([97, 98], params, progress=False)
    assert capsys.readouterr().err == ""
    both = llm.generate(["ab", [97, 98]], [params, SamplingParams(max_tokens=1, ignore_eos=True)], progress=False)
    assert ids.prompt is None
    assert ids.prompt_token_ids == [97, 98]
    assert text.token_ids == ids.token_ids == both[0].token_ids
    assert both[1].token_ids == text.token_ids[:1]
    assert both[1].tpot_s is None


def test_prompts_may_be_arrays_tensors_and_dicts(llm):
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    ids = [random.randrange(256) for _ in range(9)]
    (expected,) = llm.generate([ids], params, progress=False)
    forms = [np.array(ids), torch.tensor(ids), {"prompt_token_ids": ids}, {"prompt": "ab"}]
    outputs = llm.generate(forms, params, progress=False)
    assert [output.token_ids for output in outputs[:3]] == [expected.token_ids] * 3
    assert [output.prompt_token_ids for output in outputs] == [*[ids] * 3, [97, 98]]
    assert [output.prompt for output in outputs] == [None, None, None, "ab"]
    assert llm.generate(torch.tensor([ids]), params, progress=False)[0].token_ids == expected.token_ids
    tokens = [item.token_id for item in llm.stream(forms[2], params)]
    assert tokens == expected.token_ids


def test_a_preset_of_a_strategy_goes_by_its_name():
    carve = LLM("tiny", "shared_pool_carve", cache_bytes=4 << 20, device="cpu")
    assert carve.strategy.mode == "carve"
    assert LLM("tiny", "shared_pool", cache_bytes=4 << 20, device="cpu").strategy.mode == "exclusive"


def test_max_model_len_limits_prompt_and_output_together():
    llm = LLM("tiny", cache_bytes=4 << 20, device="cpu", max_model_len=10)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    assert len(llm.generate([[1] * 6], params, progress=False)[0].token_ids) == 4
    with pytest.raises(UserError, match=r"^prompts\[1\]: 7 tokens and max_tokens=4 exceed max_model_len=10; shorten"):
        llm.generate([[1], [1] * 7], params, progress=False)
    assert llm.engine.sequences == []


def test_a_tight_pool_preempts_and_gives_the_same_tokens(llm):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (70, 3, 130, 75, 70, 3)]
    params = [SamplingParams(max_tokens=30, temperature=rng.choice([0.0, 1.0]), ignore_eos=True) for _ in prompts]
    needed = llm.spec.request_bytes(160)
    tight = LLM(
        "tiny",
        "shared_pool",
        {"mode": "carve", "placement_seed": seed},
        cache_bytes=int(1.6 * needed),
        dtype="float64",
        device="cpu",
        max_tokens_per_step=64,
    )
    first = tight.generate(prompts, params, progress=False)
    assert sum(output.preemptions for output in first) > 0, f"seed {seed}"
    assert sum(output.recomputed_tokens for output in first) > 0, f"seed {seed}"
    roomy = LLM("tiny", cache_bytes=8 * needed, dtype="float64", device="cpu")
    expected = roomy.generate(prompts, params, progress=False)
    assert [output.token_ids for output in first] == [output.token_ids for output in expected], f"seed {seed}"


def test_a_checkpoint_with_its_tokenizer(checkpoint):
    llm = LLM(checkpoint, cache_bytes=4 << 20, device="cpu")
    assert llm.model.dtype == torch.float32
    assert llm.engine.eos_token_ids == {1}
    (output,) = llm.generate("memory is shared", SamplingParams(max_tokens=200), progress=False)
    assert output.prompt_token_ids == [2, 3, 4]
    assert set(output.text.split()) <= set(WORDS)
    if output.finish_reason == "stop":
        assert output.token_ids[-1] == 1
        assert "<end>" not in output.text
    else:
        assert len(output.token_ids) == 200


def test_the_generation_config_says_what_ends_a_text(checkpoint):
    file = checkpoint / "generation_config.json"
    before = file.read_text()
    probe = LLM(checkpoint, cache_bytes=4 << 20, device="cpu")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    full = probe.generate("memory", params, progress=False)[0].token_ids
    file.write_text(json.dumps({**json.loads(before), "eos_token_id": [full[2], 1]}))
    try:
        llm = LLM(checkpoint, cache_bytes=4 << 20, device="cpu")
    finally:
        file.write_text(before)
    assert llm.engine.eos_token_ids == {full[2], 1}
    (output,) = llm.generate("memory", SamplingParams(max_tokens=8), progress=False)
    ends = next(i for i, token in enumerate(full) if token in (full[2], 1))
    assert output.token_ids == full[: ends + 1]
    assert output.finish_reason == "stop"


def test_a_checkpoint_without_tokenizer(checkpoint, tmp_path, caplog):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint / name)
    llm = LLM(tmp_path, cache_bytes=4 << 20, device="cpu")
    assert llm.tokenizer is None  # ten ids have no room for bytes
    (output,) = llm.generate([[2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), progress=False)
    assert output.text is None
    assert len(output.token_ids) == 2
    with pytest.raises(UserError, match=r"prompts\[0\]='memory': the model has no tokenizer"):
        llm.generate("memory", progress=False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_tokenizer_that_cannot_be_read_is_told(checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint / name)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer files cannot be read"):
        load_for_inference(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"model": "no_such_model"},
            "model='no_such_model': no such folder and no such shipped config; choose one of .*tiny",
        ),
        ({"model": "jamba_v0_1"}, "model='jamba_v0_1': inference does not run jamba"),
        ({"cache_bytes": 1000}, "cache_bytes=1000: shared_pool cannot hold one request in it; give at least [0-9]+"),
        ({"cache_bytes": 0}, "cache_bytes=0: give a positive"),
        ({"cache_bytes": 1.5}, "cache_bytes=1.5: give a positive"),
        ({"cache_bytes": True}, "cache_bytes=True: give a positive"),
        ({"max_model_len": 1}, "max_model_len=1: give a number of tokens from 2 to the model's 8192, or None"),
        ({"max_model_len": 8193}, "max_model_len=8193: give a number of tokens from 2 to the model's 8192, or None"),
        ({"max_model_len": "long"}, "max_model_len='long': give a number of tokens"),
        ({"cache_bytes": 1 << 60}, "cache_bytes=1152921504606846976: takes .* at most [0-9]+ would fit"),
        ({"dtype": "int8"}, "dtype='int8': choose one of"),
        ({"kv_dtype": "int4"}, "kv_dtype='int4': choose one of"),
        ({"state_dtype": "int4"}, "state_dtype='int4': choose one of"),
        ({"strategy": "magic"}, "strategy='magic': choose one of"),
        ({"strategy": "byte_exact"}, "strategy='byte_exact': is accounting only"),
        (
            {"strategy_options": {"mood": 1}},
            "mood=1: strategy shared_pool has no such option; it has mode, kernel_block_tokens",
        ),
        ({"backend": "magic"}, "backend='magic': choose auto, torch or triton"),
        ({"backend": "triton"}, "backend='triton': needs a CUDA device"),
        ({"cuda_graphs": True}, "cuda_graphs=True: needs a CUDA device, not cpu, or cuda_graphs=false"),
        ({"overlap": "often"}, "overlap='often': choose auto, true, false"),
        ({"device": "gpu"}, "device='gpu': choose auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device='meta': choose auto, cpu, cuda or cuda:N"),
        ({"max_runing": 4}, "max_runing=4: is no option of LLM or its scheduler"),
        ({"max_running": 0}, "max_running=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        LLM(**{"model": "tiny", "cache_bytes": 4 << 20, "device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused():
    with pytest.raises(UserError, match="device='cuda': PyTorch finds no CUDA device here"):
        LLM("tiny", device="cuda")
    assert choose_device("auto").type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_the_gpu_holds_is_refused():
    with pytest.raises(UserError, match="free on cuda"):
        require_room("cache_bytes", 1 << 50, 1 << 50, torch.device("cuda"))


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"model='qwen3_next_80b_a3b': takes [0-9]+ bytes"):
        load_for_inference("qwen3_next_80b_a3b", dtype="float64", device="cpu")


@pytest.mark.parametrize(
    ("prompts", "params", "match"),
    [
        ([], None, "prompts=.*: give at least one prompt"),
        ("", None, r"prompts\[0\]='': is empty"),
        ([[1], []], None, r"prompts\[1\]=\[\]: is empty"),
        ([[1], [272]], None, r"prompts\[1\]: prompt_ids\[0\]=272: outside the model's vocabulary of 272 ids"),
        (None, None, "prompts=None: give a text, or token ids"),
        (["a", None], None, r"prompts\[1\]=None: give a text, or token ids"),
        ([1, 2.5], None, r"prompts\[0\]=1: give a text"),
        ({"text": "a"}, None, r"prompts\[0\]=\['text'\]: of a dict's keys only"),
        (["a", "b"], [SamplingParams()], "sampling_params='1 entries'"),
        ("a", {"max_tokens": 4}, r"sampling_params={'max_tokens': 4}: give SamplingParams\(max_tokens=4\)"),
        ([[1] * 8000], None, r"prompts\[0\]: request .* holds at most [0-9]+ for one request in cache_bytes=4194304"),
        ([[1] * 8190], None, r"prompts\[0\]: 8190 tokens and max_tokens=16 exceed max_model_len=8192"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(llm, prompts, params, match):
    with pytest.raises(UserError, match=match):
        llm.generate(prompts, params, progress=False)
    assert not llm.engine.has_work
    assert llm.engine.sequences == []


def test_an_interrupt_leaves_the_llm_usable(llm, monkeypatch):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = llm.generate("again", params, progress=False)[0].token_ids
    launch, steps = llm.engine.runner.launch, iter(range(10))

    def interrupted(rows):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return launch(rows)

    monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["again", "and again"], params, progress=False)
    monkeypatch.undo()
    assert not llm.strategy.residents
    assert llm.generate("again", params, progress=False)[0].token_ids == expected


def test_a_stream_gives_the_tokens_of_generate(llm):
    prompts = ["one", "two héllo", [97, 98, 99]]
    params = [
        SamplingParams(max_tokens=n, temperature=t, seed=3, ignore_eos=True) for n, t in ((9, 0), (1, 1), (14, 1))
    ]
    expected = llm.generate(prompts, params, progress=False)
    tokens, texts, outputs = [[], [], []], ["", "", ""], {}
    for item in llm.stream(prompts, params):
        tokens[item.index].append(item.token_id)
        texts[item.index] += item.text
        if item.output is not None:
            outputs[item.index] = item.output
    assert tokens == [output.token_ids for output in expected]
    assert texts == [output.text for output in expected]
    assert [outputs[i].token_ids for i in range(3)] == tokens
    assert [outputs[i].prompt for i in range(3)] == ["one", "two héllo", None]
    assert not llm.strategy.residents
    assert llm.engine.sequences == []


def test_streams_run_beside_one_another(llm):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = [output.token_ids for output in llm.generate(["a", "b", "c"], params, progress=False)]
    first, second = llm.stream("a", params), llm.stream("b", params)
    found = [next(first).token_id, next(second).token_id]
    third = llm.generate("c", params, progress=False)[0].token_ids
    assert [found[0], *(item.token_id for item in first)] == expected[0]
    assert [found[1], *(item.token_id for item in second)] == expected[1]
    assert third == expected[2]
    assert list(first) == []
    assert llm.engine.sequences == []


def test_a_stream_may_be_aborted_and_closed(llm):
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    expected = llm.generate(["a", "b"], params, progress=False)
    with llm.stream(["a", "b"], params) as stream:
        for item in stream:
            if item.output is not None:
                break
            if item.index == 0:
                stream.abort(0)
                stream.abort(0)
        assert (item.index, item.token_id) == (0, None)
        assert item.output.finish_reason == "abort"
        assert item.output.token_ids == expected[0].token_ids[: len(item.output.token_ids)]
        assert next(stream).index == 1
    assert list(stream) == []
    assert not llm.strategy.residents
    stream = llm.stream(["a", "b"], params)
    next(stream)
    assert llm.engine.has_work
    del stream
    assert not llm.engine.has_work
    with pytest.raises(UserError, match=r"prompts\[1\]"):
        llm.stream(["a", ""])
    assert llm.engine.sequences == []


def test_pieces_of_text_hold_back_half_a_character():
    pieces = TextPieces(ByteTokenizer(272))
    found = [pieces.add(byte, last=False) for byte in "é✓".encode()]
    assert found == ["", "é", "", "", "✓"]
    assert pieces.add(0xC3, last=False) == ""
    assert pieces.add(None, last=True) == "\ufffd"
    assert TextPieces(None).add(5, last=True) is None


@pytest.fixture
def interruptible():
    """Python's own handler, also where the tests run in the background of a shell, which ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_of_a_step(llm, monkeypatch, interruptible):
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = llm.generate("again", params, progress=False)[0].token_ids
    advance, ended = llm.engine.scheduler.advance, []

    def interrupted(step):
        os.kill(os.getpid(), signal.SIGINT)
        sampled = advance(step)
        ended.append(True)
        return sampled

    monkeypatch.setattr(llm.engine.scheduler, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("again", params, progress=False)
    assert ended, "the step was cut short"
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate("again", params, progress=False)[0].token_ids == expected


def test_bytes_come_back_as_text():
    tokenizer = ByteTokenizer(272)
    for text in ("plain", "héllo ✓ 漢字", "", "\x00\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([104, 257, 105]) == "hi"
    assert tokenizer.decode([104, 257, 105], skip_special_tokens=False) == "h<eos>i"
    assert tokenizer.decode([104, 271, 0xC3]) == "h\ufffd\ufffd"
    with pytest.raises(UserError, match="vocab_size=258: text as bytes needs 259 ids"):
        ByteTokenizer(258)
