"""LLM: the offline API. A model, a strategy and an engine in one object; prompts in, texts out.

llm = LLM("tiny", strategy="shared_pool", cache_bytes=64 << 20)
for output in llm.generate(["The pool is"], SamplingParams(max_tokens=8)):
    print(output.text)
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hybridcache.device import choose_device, require_room
from hybridcache.engine.engine import Engine
from hybridcache.engine.garbage import settle_heap
from hybridcache.engine.request import Request
from hybridcache.engine.sampling import SamplingParams
from hybridcache.engine.scheduler import SchedulerConfig
from hybridcache.engine.step_output import StepOutput
from hybridcache.errors import UserError, bad, whole
from hybridcache.kernels.backend import make_backend
from hybridcache.outputs import CompletionOutput, RequestOutput, StreamedToken, TokenStream, interrupts_held
from hybridcache.prefix.pins import Pin
from hybridcache.prefix.policy import PrefixPolicy
from hybridcache.prompts import EncodedPrompt, Prompt, encode, read_params, read_prompts
from hybridcache.spec import CacheSpec
from hybridcache.spec.architectures import transformers_config
from hybridcache.spec.dtypes import dtype_name
from hybridcache.strategies import build
from hybridcache.tokenizer import Tokenizer, eos_token_ids, read_tokenizer
from models.configs import shipped_fields, shipped_names
from models.registry import MODELS, build_model, load_model, make_model, read_config


class LLM:
    """A model, a cache of ``cache_bytes`` bytes under one strategy, and the engine that runs them.

    Args:
        model: the folder of a Hugging Face checkpoint, or the name of a shipped config (random weights from ``seed``).
        strategy: the name of a physical strategy (as the files in ``conf/strategy/`` are named), or the dotted path of
            a class.
        strategy_options: the strategy's own options.
        cache_bytes: size of the pool.
        max_model_len: most tokens that a request may have, prompt and output together; None for the model's
            ``max_position_embeddings``.
        dtype: element type of weights and activations. ``auto`` takes the checkpoint's; for random weights it takes
            bfloat16 on CUDA and float32 elsewhere.
        kv_dtype: element type of K and V; None for ``dtype``.
        state_dtype: element type of the recurrent states; None for float32 (float64 with ``dtype`` float64).
        device: ``auto`` takes CUDA where there is one.
        backend: who runs the cache operations: ``auto``, ``torch`` or ``triton``.
        attention_backend: whose attention kernels run: ``auto`` (the backend's own), ``torch``, ``triton`` or ``fa3``.
        cuda_graphs: whether decoding runs under CUDA graphs: ``true``, ``false``, or ``auto`` for wherever it can.
        overlap: whether a step is scheduled before the last one's tokens are known: ``true``, ``false``, or ``auto``
            for on CUDA.
        seed: seeds random weights, and requests that have no seed of their own.
        prefix: which checkpoints of prompts are made and kept, so that later prompts resume from them. ``True`` takes
            the defaults of :class:`~hybridcache.prefix.policy.PrefixPolicy`; a dict gives some of its fields. None and
            ``False`` keep what a request asks for (``SamplingParams.checkpoint_at``, :meth:`pin`) alone.
        scheduler: fields of :class:`~hybridcache.engine.scheduler.SchedulerConfig`.

    Raises:
        UserError: an argument that cannot work; the message names the field, the value and what would work.
    """

    def __init__(
        self,
        model: str | Path,
        strategy: str = "shared_pool",
        strategy_options: dict[str, Any] | None = None,
        *,
        cache_bytes: int = 1 << 30,
        max_model_len: int | None = None,
        dtype: str = "auto",
        kv_dtype: str | None = None,
        state_dtype: str | None = None,
        device: str = "auto",
        backend: str = "auto",
        attention_backend: str = "auto",
        cuda_graphs: str | bool = "auto",
        overlap: str | bool = "auto",
        seed: int = 0,
        prefix: PrefixPolicy | Mapping[str, Any] | bool | None = None,
        **scheduler: Any,
    ) -> None:
        whole("cache_bytes", cache_bytes, fix="give a positive whole number of bytes")
        scheduler_config, policy = _scheduler_config(scheduler), PrefixPolicy.read(prefix)
        settle_heap()  # before there is anything of this LLM, so that it is freed when its user drops it
        self.model, self.tokenizer = load_for_inference(model, dtype=dtype, device=device, seed=seed)
        self.max_model_len = _max_model_len(max_model_len, self.model.config.max_position_embeddings)
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
                strategy,
                spec=self.spec,
                budget_bytes=cache_bytes,
                physical=True,
                table_rows=scheduler_config.max_running,
                max_request_tokens=self.max_model_len,
                **(strategy_options or {}),
            )
            self.engine = Engine(
                self.model,
                self.strategy,
                scheduler_config,
                make_backend(backend, self.model.device, attention_backend),
                prefix=policy,
                seed=seed,
                eos_token_ids=eos_token_ids(Path(model), self.model.config, self.tokenizer),
                cuda_graphs=cuda_graphs,
                overlap=overlap,
            )
        self._streams: dict[int, tuple[deque[StreamedToken], int, int]] = {}
        """seq_id of a streamed request -> the queue that its tokens go to, the index of its prompt, and which output it is."""

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Run all prompts to their end; the outputs are in the order of the prompts.

        Args:
            prompts: texts, token ids or vLLM's dicts (:data:`~hybridcache.prompts.Prompt`); one may stand alone.
            sampling_params: one for all prompts, or one for each; None for the defaults.
            progress: show a progress bar on standard error.

        Raises:
            UserError: a prompt that cannot be run. No prompt is run then.
        """
        requests = self._submit(prompts, sampling_params)
        try:
            self._run(requests, progress)
            return [self._output(seq_id, prompt) for seq_id, prompt in requests.items()]
        finally:
            # Also after an interrupt: requests that are left give their memory back, and the LLM stays usable.
            self._drop(requests)

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> TokenStream:
        """Queue all prompts and return an iterator over their tokens as they come. The last token of a prompt brings the
        prompt's whole output. ``stream.abort(index)`` ends one prompt, ``stream.close()`` all.

        Args:
            prompts, sampling_params: as for :meth:`generate`.

        Raises:
            UserError: a prompt that cannot be run. No prompt is run then.
        """
        requests = self._submit(prompts, sampling_params)
        ids = list(requests)
        inbox: deque[StreamedToken] = deque()
        for index, first in enumerate(ids):
            for child, seq in enumerate(self._outputs_of(first)):
                self._streams[seq.seq_id] = (inbox, index, child)
        return TokenStream(
            [len(self._outputs_of(seq_id)) for seq_id in ids],
            inbox,
            self._advance,
            lambda index: self.engine.abort(ids[index]),
            lambda index: self._output(ids[index], requests[ids[index]]),
            lambda: self._drop(ids),
            self.tokenizer,
        )

    def pin(self, prompt: Prompt) -> Pin:
        """Compute a prompt now and keep checkpoints of it, from which later prompts that begin with it resume: one at its end,
        and one at the last multiple of 64 before, since a tokenizer may join its last token to what follows.

        They are never evicted for another checkpoint, only where a running request finds no memory otherwise; the next prompt
        that begins with them then makes the one at the multiple of 64 again. An interrupt drops them too.

        Raises:
            UserError: a prompt that cannot be run, several prompts, or no memory for a checkpoint of it.
        """
        items = read_prompts(prompt)
        if len(items) != 1:
            raise bad("prompt", f"{len(items)} prompts", "give one")
        encoded = encode("prompt", items[0], self.tokenizer)
        pin = self.engine.prefix.pin(encoded.token_ids)
        try:
            params = SamplingParams(max_tokens=1, checkpoint_at=pin.positions)
            self.generate({"prompt_token_ids": encoded.token_ids}, params, progress=False)
            if not self.engine.prefix.pinned(pin):
                raise bad(
                    "prompt", f"{len(encoded.token_ids)} tokens", "no memory is left to keep them; unpin another one"
                )
        except BaseException:
            self.engine.prefix.unpin(pin)
            raise
        return pin

    def unpin(self, pin: Pin) -> None:
        """Let the checkpoints of a pinned prompt be evicted as others are.

        Raises:
            UserError: it is not pinned (any more).
        """
        self.engine.prefix.unpin(pin)

    def _advance(self) -> StepOutput:
        """Run one step of the engine and hand its tokens to the streams."""
        with interrupts_held():
            step = self.engine.step()
            if self._streams:
                ended = {seq.seq_id for seq in step.finished}
                for seq_id in [*step.new_tokens, *(ended - step.new_tokens.keys())]:
                    if seq_id in self._streams:
                        inbox, index, child = self._streams[seq_id]
                        inbox.append(StreamedToken(index, child, step.new_tokens.get(seq_id), seq_id in ended))
        return step

    def _submit(self, prompts: Any, sampling_params: Any) -> dict[int, EncodedPrompt]:
        """Queue all prompts, or none. The result maps the requests' ids to the prompts, in their order."""
        items = read_prompts(prompts)
        params = read_params(sampling_params, len(items))
        encoded = [encode(f"prompts[{i}]", item, self.tokenizer) for i, item in enumerate(items)]
        requests: dict[int, EncodedPrompt] = {}
        try:
            with _cache_bytes_for_budget():
                for number, (prompt, one) in enumerate(zip(encoded, params)):
                    try:
                        if len(prompt.token_ids) + one.max_tokens > self.max_model_len:
                            raise UserError(
                                f"{len(prompt.token_ids)} tokens and max_tokens={one.max_tokens} exceed "
                                f"max_model_len={self.max_model_len}; shorten the prompt or the output"
                            )
                        requests[self.engine.add_request(prompt.token_ids, one).seq_id] = prompt
                    except UserError as error:
                        raise UserError(f"prompts[{number}]: {error}") from error
        except BaseException:
            self._drop(requests)
            raise
        return requests

    def _outputs_of(self, seq_id: int) -> tuple[Request, ...]:
        """The requests that give the outputs of a prompt, whose first is given."""
        first = self.engine.sequence(seq_id)
        return cast("tuple[Request, ...]", first.siblings) or (first,)

    def _drop(self, ids: Iterable[int]) -> None:
        """End these requests and their siblings and forget them. Requests that are forgotten already are passed over."""
        for first in ids:
            if self.engine.knows(first):
                self.engine.abort(first)
                for seq in reversed(
                    self._outputs_of(first)
                ):  # the first one last: by it, a call after an interrupt goes on
                    if self.engine.knows(seq.seq_id):
                        self.engine.forget(seq.seq_id)
                    self._streams.pop(seq.seq_id, None)

    def _run(self, requests: Collection[int], progress: bool) -> None:
        """Step until these requests have ended."""
        ids = {seq.seq_id for first in requests for seq in self._outputs_of(first)}
        left, tokens = len(ids), 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("generate", total=left)  # outputs
            started = self.engine.now()
            while left:
                step = self._advance()
                tokens += len(step.new_tokens)
                finished = sum(seq.seq_id in ids for seq in step.finished)
                left -= finished
                if progress:
                    rate = tokens / max(self.engine.now() - started, 1e-9)
                    bar.update(task, advance=finished, description=f"generate, {rate:,.0f} tok/s")

    def _output(self, seq_id: int, prompt: EncodedPrompt) -> RequestOutput:
        seqs = self._outputs_of(seq_id)
        outputs = [self._completion(index, seq) for index, seq in enumerate(seqs)]
        return RequestOutput(prompt.text, prompt.token_ids, seqs[0].arrival_s, outputs)

    def _completion(self, index: int, seq: Request) -> CompletionOutput:
        assert seq.finish_reason is not None
        assert seq.finish_s is not None
        return CompletionOutput(
            index=index,
            token_ids=seq.output_ids,
            text=self.tokenizer.decode(seq.output_ids, skip_special_tokens=True) if self.tokenizer else None,
            finish_reason=seq.finish_reason,
            error=seq.error,
            first_token_s=seq.first_token_s,
            finish_s=seq.finish_s,
            ttft_s=seq.ttft_s,
            tpot_s=seq.tpot_s,
            preemptions=seq.num_preemptions,
            recomputed_tokens=seq.recomputed_tokens,
            hit_tokens=seq.hit_tokens,
            refound_tokens=seq.refound_tokens,
        )


def load_for_inference(
    model: str | Path,
    fields: Mapping[str, Any] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
) -> tuple[Any, Tokenizer | None]:
    """Load a model and its tokenizer from a checkpoint folder or a shipped config; the arguments are those of :class:`LLM`.

    With ``fields`` of a configuration the model has random weights, and ``model`` stands for it in errors. Where there is no
    tokenizer, text is taken as bytes; the tokenizer is None where the model's vocabulary has no room for those.

    Raises:
        UserError: an unknown model, an architecture that inference does not run, a field that it refuses, a device that is
            not there, or weights that do not fit it.
    """
    chosen = choose_device(device)
    folder = Path(model) if fields is None and Path(model).is_dir() else None
    if folder is not None:
        config = read_config(folder)
        default = getattr(config, "dtype", None) or "bfloat16"
    else:
        config = transformers_config(_runnable(str(model), fields))
        default = "bfloat16" if chosen.type == "cuda" else "float32"
    name = dtype_name(default if dtype == "auto" else dtype)
    weight_bytes = int(make_model(config, name, "meta").weight_bytes)  # counted on a model without memory
    require_room("model", str(model), weight_bytes, chosen)
    loaded = load_model(folder, name, chosen) if folder else build_model(config, name, chosen, seed=seed)
    return loaded, read_tokenizer(folder, config.vocab_size)


def _runnable(name: str, fields: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """These fields, or those of the shipped config of that name, of an architecture that inference runs."""
    if fields is None and name not in shipped_names():
        raise bad("model", name, f"no such folder and no such shipped config; {_known()}")
    found = shipped_fields(name) if fields is None else fields
    if found.get("model_type") not in MODELS:
        reason = f"inference does not run {found.get('model_type')}, only its geometry"
        raise bad(
            "model", name, f"{reason}; {_known() if fields is None else 'choose another, or leave inference out'}"
        )
    return found


def _known() -> str:
    return (
        f"choose one of {', '.join(each for each in shipped_names() if shipped_fields(each)['model_type'] in MODELS)}"
    )


def _max_model_len(given: int | None, longest: int) -> int:
    """Most tokens of a request; ``longest`` is what the model's positions allow."""
    if given is None:
        return longest
    if isinstance(given, bool) or not isinstance(given, int) or not 1 < given <= longest:
        raise bad("max_model_len", given, f"give a number of tokens from 2 to the model's {longest}, or None for all")
    return given


def _scheduler_config(options: dict[str, Any]) -> SchedulerConfig:
    known = SchedulerConfig.__dataclass_fields__
    for name, value in options.items():
        if name not in known:
            raise bad(name, value, f"is no option of LLM or its scheduler; the scheduler has {', '.join(known)}")
    return SchedulerConfig(**options)


@contextmanager
def _cache_bytes_for_budget() -> Iterator[None]:
    """Strategies call the budget ``budget_bytes`` in their errors; a user of the LLM knows it as ``cache_bytes``."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("budget_bytes", "cache_bytes")) from error
