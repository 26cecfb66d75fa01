"""LLM: the offline API. A model, a strategy and an engine in one object; prompts in, texts out.

llm = LLM("tiny", strategy="shared_pool", cache_bytes=64 << 20)
for output in llm.generate(["The pool is"], SamplingParams(max_tokens=8)):
    print(output.text)
"""

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hybridcache.device import choose_device, require_room
from hybridcache.engine.engine import Engine
from hybridcache.engine.garbage import settle_heap
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.step_output import StepOutput
from hybridcache.errors import UserError, bad
from hybridcache.kernels.backend import make_backend
from hybridcache.outputs import RequestOutput, TokenStream, interrupts_held
from hybridcache.spec import CacheSpec
from hybridcache.spec.dtypes import dtype_name
from hybridcache.strategies import build
from hybridcache.workloads.byte_tokenizer import ByteTokenizer
from models.configs import shipped_config, shipped_fields, shipped_names
from models.registry import MODELS, build_model, load_model, make_model, read_config

_LOG = logging.getLogger(__name__)

Prompt = str | Sequence[int]


class Tokenizer(Protocol):
    """What is needed of a tokenizer; Transformers' have it."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class LLM:
    """A model with a cache of ``cache_bytes`` bytes under one strategy.

    Args:
        model: folder of a Hugging Face checkpoint, or name of a shipped config (random weights from ``seed``).
        strategy: name of a physical strategy, or the dotted path of a class.
        strategy_options: the strategy's own options.
        cache_bytes: size of the pool.
        dtype: of weights and activations. ``auto`` is the checkpoint's, or for random weights bfloat16 on CUDA and
            float32 elsewhere.
        kv_dtype: of K and V; None for ``dtype``.
        state_dtype: of the recurrent states; None for float32 (float64 with ``dtype`` float64).
        device: ``auto`` is CUDA where there is one.
        backend: of the cache operations: ``auto``, ``torch`` or ``triton``.
        attention_backend: whose attention kernels: ``auto`` (the backend's own), ``torch``, ``triton`` or ``fa3``.
        cuda_graphs: decode under CUDA graphs: ``true``, ``false``, or ``auto``: wherever it can be.
        overlap: schedule a step before the last one's tokens are known: ``true``, ``false``, or ``auto``: on CUDA.
        seed: of random weights, and of requests that have no seed of their own.
        scheduler: fields of :class:`~hybridcache.engine.scheduler.SchedulerConfig`.

    Raises:
        UserError: whatever of these cannot work; the message names the field, the value and what would.
    """

    def __init__(
        self,
        model: str | Path,
        strategy: str = "shared_pool",
        strategy_options: dict[str, Any] | None = None,
        *,
        cache_bytes: int = 1 << 30,
        dtype: str = "auto",
        kv_dtype: str | None = None,
        state_dtype: str | None = None,
        device: str = "auto",
        backend: str = "auto",
        attention_backend: str = "auto",
        cuda_graphs: str | bool = "auto",
        overlap: str | bool = "auto",
        seed: int = 0,
        **scheduler: Any,
    ) -> None:
        if not isinstance(cache_bytes, int) or cache_bytes < 1:
            raise bad("cache_bytes", cache_bytes, "give a positive whole number of bytes")
        scheduler_config = _scheduler_config(scheduler)
        settle_heap()  # before there is anything of this LLM, so that it is freed when its user drops it
        self.model, self.tokenizer = load_for_inference(model, dtype=dtype, device=device, seed=seed)
        require_room("cache_bytes", cache_bytes, cache_bytes, self.model.device)
        model_dtype = dtype_name(self.model.dtype)
        self.spec = CacheSpec.from_config(
            self.model.config,
            kv_dtype=kv_dtype or model_dtype,
            state_dtype=state_dtype or ("float64" if model_dtype == "float64" else "float32"),
            conv_dtype=model_dtype,
        )
        with _cache_bytes_for_budget():
            self.strategy = build(
                strategy, spec=self.spec, budget_bytes=cache_bytes, physical=True, **(strategy_options or {})
            )
            self.engine = Engine(
                self.model,
                self.strategy,
                scheduler_config,
                make_backend(backend, self.model.device, attention_backend),
                seed=seed,
                eos_token_ids=_eos_token_ids(Path(model), self.model.config, self.tokenizer),
                cuda_graphs=cuda_graphs,
                overlap=overlap,
            )
        self._inboxes: dict[int, tuple[deque[tuple[int, int | None, bool]], int]] = {}
        """For every request of a stream where its tokens go, and its number there."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Run all prompts to their end; outputs are in the order of the prompts.

        Args:
            prompts: texts or lists of token ids; a single one may stand alone.
            sampling_params: one for all, or one per prompt; None for the defaults.
            progress: show a progress bar on standard error.

        Raises:
            UserError: a prompt that cannot be run; then none is.
        """
        items, encoded, ids = self._submit(prompts, sampling_params)
        try:
            self._run(ids, progress)
            return [self._output(seq_id, item, tokens) for seq_id, item, tokens in zip(ids, items, encoded)]
        finally:
            # Also after an interrupt: what is left gives its memory back, and the LLM stays usable.
            self._drop(ids)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> TokenStream:
        """Queue all prompts and return an iterator over their tokens as they come; a prompt's last one brings its whole
        output. ``stream.abort(index)`` ends one of them, ``stream.close()`` all.

        Args:
            prompts, sampling_params: as of :meth:`generate`.

        Raises:
            UserError: a prompt that cannot be run; then none is.
        """
        items, encoded, ids = self._submit(prompts, sampling_params)
        inbox: deque[tuple[int, int | None, bool]] = deque()
        self._inboxes |= {seq_id: (inbox, index) for index, seq_id in enumerate(ids)}
        return TokenStream(
            ids,
            inbox,
            self._advance,
            lambda index: self.engine.abort(ids[index]),
            lambda index: self._output(ids[index], items[index], encoded[index]),
            lambda: self._drop(ids),
            self.tokenizer,
        )

    def _advance(self) -> StepOutput:
        """One step of the engine; streams get their tokens."""
        with interrupts_held():
            step = self.engine.step()
            if self._inboxes:
                ended = {seq.seq_id for seq in step.finished}
                for seq_id in [*step.new_tokens, *(ended - step.new_tokens.keys())]:
                    if seq_id in self._inboxes:
                        inbox, index = self._inboxes[seq_id]
                        inbox.append((index, step.new_tokens.get(seq_id), seq_id in ended))
        return step

    def _submit(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> tuple[list[Prompt], list[list[int]], list[int]]:
        """Queue all prompts, or none: the prompts as a list, their tokens, and their requests' ids."""
        items = _as_list(prompts)
        params = _as_params(sampling_params, len(items))
        encoded = [self._encode(i, item, one.max_tokens) for i, (item, one) in enumerate(zip(items, params))]
        ids: list[int] = []
        try:
            with _cache_bytes_for_budget():
                for number, (tokens, one) in enumerate(zip(encoded, params)):
                    try:
                        ids.append(self.engine.add_request(tokens, one).seq_id)
                    except UserError as error:
                        raise UserError(f"prompts[{number}]: {error}") from error
        except BaseException:
            self._drop(ids)
            raise
        return items, encoded, ids

    def _drop(self, ids: list[int]) -> None:
        """End these requests and forget them; those that are forgotten already are passed over."""
        for seq_id in ids:
            if self.engine.knows(seq_id):
                self.engine.abort(seq_id)
                self.engine.forget(seq_id)
            self._inboxes.pop(seq_id, None)

    def _encode(self, number: int, prompt: Prompt, max_tokens: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise bad(f"prompts[{number}]", prompt[:40], "the model has no tokenizer; give token ids")
            tokens = list(self.tokenizer.encode(prompt))
        else:
            tokens = list(prompt)
        if not tokens:
            raise bad(f"prompts[{number}]", prompt, "is empty; give at least one token")
        longest = self.model.config.max_position_embeddings
        if len(tokens) + max_tokens > longest:
            raise UserError(
                f"prompts[{number}]: {len(tokens)} tokens and max_tokens={max_tokens} exceed the model's "
                f"max_position_embeddings={longest}; shorten the prompt or the output"
            )
        return tokens

    def _run(self, ids: list[int], progress: bool) -> None:
        """Step until these requests have ended."""
        mine, left, tokens = set(ids), len(ids), 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("generate", total=left)
            started = self.engine.now()
            while left:
                step = self._advance()
                tokens += len(step.new_tokens)
                finished = sum(seq.seq_id in mine for seq in step.finished)
                left -= finished
                if progress:
                    rate = tokens / max(self.engine.now() - started, 1e-9)
                    bar.update(task, advance=finished, description=f"generate, {rate:,.0f} tok/s")

    def _output(self, seq_id: int, prompt: Prompt, tokens: list[int]) -> RequestOutput:
        seq = self.engine.sequence(seq_id)
        assert seq.finish_reason is not None
        assert seq.finish_s is not None
        return RequestOutput(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=tokens,
            token_ids=seq.output_ids,
            text=self.tokenizer.decode(seq.output_ids, skip_special_tokens=True) if self.tokenizer else None,
            finish_reason=seq.finish_reason,
            error=self.engine.error(seq_id),
            arrival_s=seq.arrival_s,
            first_token_s=seq.first_token_s,
            finish_s=seq.finish_s,
            ttft_s=seq.ttft_s,
            tpot_s=seq.tpot_s,
            preemptions=seq.num_preemptions,
            recomputed_tokens=seq.recomputed_tokens,
        )


def load_for_inference(
    model: str | Path, *, dtype: str = "auto", device: str = "auto", seed: int = 0
) -> tuple[Any, Tokenizer | None]:
    """A model and its tokenizer, from a checkpoint folder or a shipped config (arguments as of :class:`LLM`).

    The tokenizer is the folder's; where there is none, text is taken as bytes. It is None where the model's vocabulary
    has no room for those.

    Raises:
        UserError: an unknown model, an architecture that inference does not run, a device that is not there, or weights
            that do not fit it.
    """
    chosen = choose_device(device)
    folder = Path(model)
    if folder.is_dir():
        config = read_config(folder)
        stored = getattr(config, "dtype", None) or "bfloat16"
        name = dtype_name(stored if dtype == "auto" else dtype)
    else:
        config = _shipped(str(model))
        name = dtype_name(("bfloat16" if chosen.type == "cuda" else "float32") if dtype == "auto" else dtype)
    require_room("model", str(model), _weight_bytes(config, name), chosen)
    loaded = load_model(folder, name, chosen) if folder.is_dir() else build_model(config, name, chosen, seed=seed)
    return loaded, _tokenizer(folder, config.vocab_size)


def _shipped(name: str) -> Any:
    known = [each for each in shipped_names() if shipped_fields(each)["model_type"] in MODELS]
    if name not in shipped_names():
        raise bad("model", name, f"no such folder and no such shipped config; choose one of {', '.join(known)}")
    if name not in known:
        kind = shipped_fields(name)["model_type"]
        raise bad("model", name, f"inference does not run {kind}, only its geometry; choose one of {', '.join(known)}")
    return shipped_config(name)


def _weight_bytes(config: Any, dtype: str) -> int:
    """Bytes of the weights, counted on a model without memory."""
    return int(make_model(config, dtype, "meta").weight_bytes)


def _tokenizer(folder: Path, vocabulary: int) -> Tokenizer | None:
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        from transformers import AutoTokenizer

        loader: Any = AutoTokenizer
        try:
            return loader.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # Transformers raises many types here, all for files that it cannot use
            reason = " ".join(str(error).split())
            raise bad("model", str(folder), f"its tokenizer files cannot be read ({reason})") from error
    if vocabulary < ByteTokenizer.vocab_size:
        return None
    if folder.is_dir():
        _LOG.warning("%s has no tokenizer: text is taken as bytes", folder)
    return ByteTokenizer(vocabulary)


def _eos_token_ids(folder: Path, config: Any, tokenizer: Tokenizer | None) -> list[int]:
    """The ids that end a request: of the checkpoint's generation config, else of its config, else of its tokenizer."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    if found is None:
        found = getattr(config, "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]


def _scheduler_config(options: dict[str, Any]) -> SchedulerConfig:
    known = SchedulerConfig.__dataclass_fields__
    for name, value in options.items():
        if name not in known:
            raise bad(name, value, f"is no option of LLM or its scheduler; the scheduler has {', '.join(known)}")
    return SchedulerConfig(**options)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if not items:
        raise bad("prompts", prompts, "give at least one prompt")
    return [items] if all(isinstance(item, int) for item in items) else items


def _as_params(given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    params = list(given)
    if len(params) != count:
        raise bad("sampling_params", f"{len(params)} entries", f"give one, or one for each of the {count} prompts")
    return params


@contextmanager
def _cache_bytes_for_budget() -> Iterator[None]:
    """Errors of strategies speak of ``budget_bytes``; here it is ``cache_bytes``."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("budget_bytes", "cache_bytes")) from error
