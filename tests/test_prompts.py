"""Prompts and sampling parameters in every form that a user may give, and what is said of other forms."""

import random

import numpy as np
import pytest
import torch

from hybridcache.engine.sampling import SamplingParams
from hybridcache.errors import UserError
from hybridcache.prompts import encode, read_params, read_prompts
from hybridcache.workloads.byte_tokenizer import ByteTokenizer

IDS = [random.randrange(256) for _ in range(random.randrange(2, 40))]


@pytest.mark.parametrize(
    "one",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, dtype=np.uint8),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        list(torch.tensor(IDS)),
        list(np.array(IDS)),
        {"prompt_token_ids": IDS},
        {"prompt_token_ids": np.array(IDS)},
        {"prompt_token_ids": torch.tensor(IDS), "prompt": "the ids count"},
    ],
    ids=lambda one: type(one).__name__,
)
def test_token_ids_alone_and_among_others(one):
    assert read_prompts(one) == [IDS]
    assert read_prompts([one]) == [IDS]
    assert read_prompts(["text", one]) == ["text", IDS]
    assert all(type(token) is int for token in read_prompts(one)[0])


@pytest.mark.parametrize("one", ["text", {"prompt": "text"}, np.str_("text"), {"prompt": np.str_("text")}])
def test_texts_alone_and_among_others(one):
    assert read_prompts(one) == ["text"]
    assert read_prompts([IDS, one]) == [IDS, "text"]
    assert read_prompts(iter([one, one])) == ["text", "text"]


def test_two_dimensions_are_one_prompt_a_row():
    rows = [IDS, IDS[::-1]]
    assert read_prompts(rows) == read_prompts(np.array(rows)) == read_prompts(torch.tensor(rows)) == rows
    assert read_prompts([torch.tensor([5]), torch.tensor([6])]) == [[5], [6]]  # not one prompt of two tokens
    assert read_prompts(np.array(["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts=None: give a text, or token ids as a list, an array or a tensor of whole numbers"),
        (7, "prompts=7: give a text, or token ids"),
        (True, "prompts=True: give a text, or token ids"),
        (b"bytes", "prompts=b'bytes': give a text, or token ids"),
        (torch.tensor(3), "prompts=3: give a text, or token ids"),
        ([], "prompts=[]: give at least one prompt"),
        (np.array([], dtype=np.int64), "give at least one prompt"),
        (["a", None], "prompts[1]=None: give a text, or token ids"),
        ([[1], 2], "prompts[1]=2: give a text, or token ids"),
        ([1, "a"], "prompts[0]=1: give a text, or token ids"),
        ([1, None], "prompts[0]=1: give a text, or token ids"),
        ([1, 2.5], "prompts[0]=1: give a text, or token ids"),
        ([True, False], "prompts[0]=True: give a text, or token ids"),
        ([b"bytes"], "prompts[0]=b'bytes': give a text, or token ids"),
        ([{1, 2}], "prompts[0]={1, 2}: give a text, or token ids"),
        ([[1, 2.5]], "prompts[0][1]=2.5: is no token id; give whole numbers"),
        ([["a"], [1]], "prompts[0][0]='a': is no token id; give whole numbers"),
        ([[1, True]], "prompts[0][1]=True: is no token id"),
        (np.array([[1.0, 2.0]]), "prompts[0][0]=1.0: is no token id"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), "prompts[0][0]=[0, 0]: is no token id"),
        ({}, "prompts[0]=[]: of a dict's keys only prompt and prompt_token_ids are understood"),
        (
            {"prompt": "a", "multi_modal_data": 1},
            "prompts[0]=['multi_modal_data', 'prompt']: of a dict's keys only prompt and prompt_token_ids",
        ),
        ({"prompt": None}, "prompts[0]['prompt']=None: give a text"),
        ({"prompt": [1]}, "prompts[0]['prompt']=[1]: give a text"),
        ([{"prompt_token_ids": "a"}], "prompts[0]['prompt_token_ids']='a': give token ids"),
        (["a", {"prompt_token_ids": None}], "prompts[1]['prompt_token_ids']=None: give a text, or token ids"),
        ({"prompt_token_ids": [1, "x"]}, "prompts[0]['prompt_token_ids'][1]='x': is no token id"),
    ],
)
def test_other_forms_are_refused_by_name_in_one_line(prompts, message):
    with pytest.raises(UserError) as refused:
        read_prompts(prompts)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_long_prompt_that_is_refused_is_not_recited():
    with pytest.raises(UserError) as refused:
        read_prompts([{"a": 1}, [[5] * 100_000]])
    assert len(str(refused.value)) < 300
    with pytest.raises(UserError) as refused:
        read_prompts([[[5] * 100_000]])
    assert str(refused.value).startswith("prompts[0][0]=[5, 5, ")
    assert len(str(refused.value)) < 300


def test_encoding_needs_a_tokenizer_and_a_token():
    tokenizer = ByteTokenizer(300)
    assert encode("prompts[0]", "ab", tokenizer) == ("ab", [97, 98])
    assert encode("prompts[0]", [5, 6], None) == (None, [5, 6])
    with pytest.raises(UserError, match=r"^prompts\[3\]='ab': the model has no tokenizer; give token ids"):
        encode("prompts[3]", "ab", None)
    for empty in ("", []):
        with pytest.raises(UserError, match=r"^prompts\[2\]=..: is empty; give at least one token"):
            encode("prompts[2]", empty, tokenizer)


def test_sampling_parameters_for_all_or_for_each():
    some = [SamplingParams(max_tokens=n) for n in (3, 5)]
    assert read_params(None, 2) == [SamplingParams()] * 2
    assert read_params(some[0], 2) == [some[0]] * 2
    assert read_params(some, 2) == read_params(iter(some), 2) == read_params(tuple(some), 2) == some


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_tokens": 4, "temperature": 0.5},
            "sampling_params={'max_tokens': 4, 'temperature': 0.5}: give SamplingParams(max_tokens=4, temperature=0.5)",
        ),
        (
            {"max_token": 4},
            "sampling_params={'max_token': 4}: give a SamplingParams, whose fields are max_tokens, temp",
        ),
        ({3: 4}, "sampling_params={3: 4}: give a SamplingParams, whose fields are"),
        (5, "sampling_params=5: give a SamplingParams"),
        ("greedy", "sampling_params='greedy': give a SamplingParams"),
        ([SamplingParams(), {"top_k": 3}], "sampling_params[1]={'top_k': 3}: give SamplingParams(top_k=3)"),
        ([None, SamplingParams()], "sampling_params[0]=None: give a SamplingParams"),
        ([SamplingParams()], "sampling_params='1 entries': give one, or one for each of the 2 prompts"),
        ([], "sampling_params='0 entries': give one"),
    ],
)
def test_other_sampling_parameters_are_refused_with_the_fix(given, message):
    with pytest.raises(UserError) as refused:
        read_params(given, 2)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
