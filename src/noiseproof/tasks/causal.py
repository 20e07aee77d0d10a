"""Prompts with responses: language models, decoders and encoder-decoders, on doubtful responses.

columns of prompts and responses, or chat messages -> `Dialogues`
-> tokens of prompt and response, the boundary known (`EncodedDialogues`)
-> token ids, attention mask and targets (B, T), padded on the right batch by batch

A row's loss is the mean over its response tokens, the end of text included. Rows are padded, not
packed: packing would let rows see each other unless the attention is told, and batches of similar
length leave little to gain.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.data import Examples, Inputs
from noiseproof.encoding import Encoded
from noiseproof.errors import InputError
from noiseproof.method import Method, require
from noiseproof.noise import NoiseModel
from noiseproof.saving import save_model
from noiseproof.tasks.base import LabelColumns, RowSettings, Task
from noiseproof.tasks.dialogues import DialogueColumns, Dialogues, read_dialogues
from noiseproof.tasks.language import (
    generate,
    is_encoder_decoder,
    load_language_model,
    load_saved_language_model,
)
from noiseproof.tasks.measures import Measures, ResponseMeasures
from noiseproof.tokens import IGNORED, TARGETS, losses_of_statistics, token_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from noiseproof.tables import Source, Table


class EncodedDialogues(Encoded):
    """Tokens of prompts and responses, padded batch by batch.

    Attributes:
        prompts: N arrays of token ids.
        responses: N arrays of token ids; empty where no token was left.
        start: First token of the decoder's input; None for a decoder alone, which reads on.
        pad: The token that pads; it is masked.
    """

    one_output = False

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        start: int | None,
        pad: int,
    ) -> None:
        self.prompts, self.responses = prompts, responses
        self.start, self.pad = start, pad
        sizes = zip(map(len, prompts), map(len, responses), strict=True)
        self.lengths = np.array([max(1, one + other) for one, other in sizes], dtype=np.int64)

    def inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        """What the model takes, and `TARGETS`: the token that each output position predicts.

        A decoder reads prompt and response but for the last token, which nothing follows. An
        encoder reads the prompt, its decoder the response behind a start token.
        """
        prompts = [self.prompts[row] for row in rows]
        responses = [self.responses[row] for row in rows]
        if self.start is None:
            whole = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
            targets = [
                np.concatenate([np.full(max(len(one) - 1, 0), IGNORED), other])
                for one, other in zip(prompts, responses, strict=True)
            ]
            read = [tokens[: max(len(tokens) - 1, 1)] for tokens in whole]
            return {**self._inputs(read), TARGETS: _padded(targets, IGNORED, _width(read))}
        shifted = [np.concatenate([[self.start], response[:-1]]) for response in responses]
        return {
            **self._inputs(prompts),
            **{f"decoder_{name}": tensor for name, tensor in self._inputs(shifted).items()},
            TARGETS: _padded(responses, IGNORED, _width(shifted)),
        }

    def outputs(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Statistics (B, 3) of the response tokens, see `noiseproof.tokens.token_statistics`."""
        return token_statistics(model, inputs)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss per response token (N,); the response is part of the row, not of labels."""
        return losses_of_statistics(outputs)

    def _inputs(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        ids = _padded(rows, self.pad, _width(rows))
        mask = _padded([np.ones(len(row), dtype=np.int64) for row in rows], 0, _width(rows))
        return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class CausalLM(Task):
    """Prompts, or chat messages, with the response that a language model learns.

    Attributes:
        tokenizer: A transformers tokenizer.
        settings: How rows are read and measured.
        start: First token of a decoder that has an encoder; None for a decoder alone.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: RowSettings
    start: int | None = None

    name: ClassVar[str] = "causal-lm"
    summary: ClassVar[str] = "prompts or chat messages with responses"
    column: ClassVar[str] = "text"
    text_labels: ClassVar[bool] = True
    measures: ClassVar[Measures] = ResponseMeasures()
    answer_columns: ClassVar[tuple[str, ...]] = ("predicted_response", "response_loss")

    # --- reading ---------------------------------------------------------------------------------

    @classmethod
    def reader(cls, settings: RowSettings) -> DialogueColumns:
        """Reads prompts, without responses."""
        return DialogueColumns(settings.text)

    @classmethod
    def reader_of_new(cls, settings: RowSettings, table: Table, label: str) -> DialogueColumns:
        """Reads prompts, and responses where the rows have some."""
        reader = cls.reader(settings)
        known = label in table.frame.columns or reader.ends_in_response(table)
        return replace(reader, label=label) if known else reader

    @classmethod
    def examples(
        cls, source: Source, settings: RowSettings, columns: LabelColumns, split: str, role: str
    ) -> Examples:
        """Read prompts with their responses."""
        require(
            role != "training" or columns.label_names is None,
            "label_names names classes; task causal-lm has responses",
        )
        reader = DialogueColumns(settings.text, columns.label, columns.clean_label)
        return read_dialogues(
            source,
            reader,
            row_id=columns.row_id,
            drop_label=columns.drop_label,
            split=split,
            role=role,
        )

    @classmethod
    def check_noise(cls, noise: NoiseModel) -> None:
        """Refuse noise on classes."""
        require(
            not noise.on_labels,
            f"noise {noise.spec!r} changes classes; responses take swap:RATE (they change places) "
            "or text:RATE (their letters and words suffer)",
        )

    @classmethod
    def fitted(cls, method: Method, model: Any) -> Method:
        """The method as it runs on tokens."""
        require(
            model is None or isinstance(model, str | Path), "the model must be a name or folder"
        )
        require(str(model) != "minilm", "task 'causal-lm' needs a language model: give model")
        return method.for_tokens()

    # --- the network -----------------------------------------------------------------------------

    @classmethod
    def load(
        cls, model: Any, data: Examples, settings: RowSettings, *, reserved_tokens: int = 0
    ) -> tuple[CausalLM, nn.Module]:
        """Load a language model with its tokenizer."""
        network, tokenizer = load_language_model(str(model), reserved_tokens=reserved_tokens)
        return cls(tokenizer, settings, _start_of(network)), network

    @classmethod
    def load_saved(
        cls, folder: Path, model: Any, settings: RowSettings
    ) -> tuple[CausalLM, nn.Module]:
        """Load what `save` wrote."""
        network, tokenizer = load_saved_language_model(folder, model)
        return cls(tokenizer, settings, _start_of(network)), network

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write model and tokenizer as transformers and peft do."""
        save_model(model, self.tokenizer, folder)

    def with_settings(self, settings: RowSettings) -> CausalLM:
        """The task with other settings of reading."""
        return replace(self, settings=settings)

    # --- encoding --------------------------------------------------------------------------------

    def inputs_of(self, rows: Any, second: Any = None) -> Dialogues:
        """Prompts, and responses where they are given; lists of messages are chats."""
        given = list(rows)
        if given and not isinstance(given[0], str):
            texts = [json.dumps(list(turns), ensure_ascii=False) for turns in given]
            return Dialogues(texts, second, chat=True)
        return Dialogues(given, second)

    def encode(self, inputs: Inputs) -> EncodedDialogues:
        """Tokenise prompts and responses each on its own, so that the boundary is exact.

        Rows longer than ``max_length`` lose the end of their response.
        """
        assert isinstance(inputs, Dialogues)
        limit = self._limit
        prompts, responses = [], []
        for first, second in self._ids(inputs):
            first = self._shortened(first, limit)
            room = limit - len(first) if self.start is None else limit
            prompts.append(np.array(first, dtype=np.int64))
            responses.append(np.array(second[:room], dtype=np.int64))
        empty = sum(not len(response) for response in responses)
        if empty == len(responses):
            raise InputError(
                f"no row has a response token within {limit} tokens: the prompts alone are longer; "
                "raise train.max_length"
            )
        if empty:
            warnings.warn(
                f"{empty} of {len(responses)} rows have no response token within {limit} tokens "
                "and teach nothing; raise train.max_length",
                UserWarning,
                stacklevel=2,
            )
        encoded = EncodedDialogues(prompts, responses, self.start, self._pad)
        encoded.source = (inputs, self.encode)
        encoded.counts = {"without_response": empty} if empty else {}
        return encoded

    def encode_alone(self, inputs: Dialogues, encoded: EncodedDialogues) -> EncodedDialogues:
        """The responses of `encode`, token by token, after prompts that say nothing.

        What frames a prompt stays: the template, or the turns of a chat without their content.
        """
        texts = [(*("" for _ in said), response) for *said, response in inputs.as_texts()]
        empty = inputs.with_texts(texts)
        prompts = [
            np.array(first[: max(1, len(prompt))], dtype=np.int64)
            for (first, _), prompt in zip(self._ids(empty), encoded.prompts, strict=True)
        ]
        return EncodedDialogues(prompts, encoded.responses, self.start, self._pad)

    @property
    def _limit(self) -> int:
        """Tokens of a row, or of each side of an encoder-decoder."""
        return min(self.settings.max_length, int(self.tokenizer.model_max_length))

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def _ids(self, inputs: Dialogues) -> list[tuple[list[int], list[int]]]:
        """Tokens of every prompt and of its response, whole."""
        require(inputs.responses is not None, "these rows have no responses; give their column")
        return [
            (self._prompt_ids(prompt, inputs.chat), self._response_ids(response, inputs.chat))
            for prompt, response in zip(*self._texts(inputs), strict=True)
        ]

    def _shortened(self, prompt: list[int], limit: int) -> list[int]:
        """The beginning of a prompt; the encoder of an encoder-decoder still sees its end token."""
        if len(prompt) <= limit:
            return prompt
        end = prompt[-1:] if self.start is not None else []
        ends = end == [self.tokenizer.eos_token_id]
        return [*prompt[: limit - 1], *end] if ends else prompt[:limit]

    def _texts(self, inputs: Dialogues) -> tuple[list[str], list[str]]:
        """Prompts and responses as they are tokenised."""
        responses = list(inputs.responses or [""] * len(inputs))
        if not inputs.chat:
            return [self._framed(prompt) for prompt in inputs.prompts], responses
        prompts, tails = [], []
        for row, (text, response) in enumerate(zip(inputs.prompts, responses, strict=True)):
            turns = json.loads(text)
            prompt = self._chat(turns, True, row)
            answer = {"role": "assistant", "content": response}
            whole = self._chat([*turns, answer], False, row)
            if not whole.startswith(prompt):
                raise InputError(
                    "the tokenizer's chat template does not continue a prompt with its response; "
                    "give prompt and response columns instead of messages"
                )
            prompts.append(prompt)
            tails.append(whole[len(prompt) :])
        return prompts, tails

    def _framed(self, prompt: str) -> str:
        return self.settings.template.replace("{prompt}", prompt)

    def _chat(self, turns: list[dict[str, str]], ask: bool, row: int) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                "the rows are chat messages, and the tokenizer of this model has no chat template; "
                "use an instruction-tuned model, or give prompt and response columns"
            )
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
            )
        except TemplateError as error:
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            raise InputError(
                f"the tokenizer's chat template refuses the messages of row {row + 1} ({roles}): "
                f"{error}; leave out or merge what it does not take, such as a system message"
            ) from error

    def _prompt_ids(self, prompt: str, chat: bool) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
        end = self.tokenizer.eos_token_id
        if self.start is None and not chat and len(ids) > 1 and ids[-1] == end:
            ids = ids[:-1]  # a decoder would stop before the response
        return ids or [int(self.tokenizer.bos_token_id or self.tokenizer.pad_token_id or 0)]

    def _response_ids(self, response: str, chat: bool) -> list[int]:
        ids: list[int] = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids if chat or end is None else [*ids, int(end)]

    # --- answering -------------------------------------------------------------------------------

    def respond(self, model: nn.Module, inputs: Dialogues) -> list[str]:
        """Answer prompts greedily: N texts of at most ``max_new_tokens`` tokens.

        A decoder has room for prompt and response together: the response gets half of it at most,
        and a prompt that is too long for the rest loses its beginning. An encoder sees of a prompt
        what it saw in training.
        """
        limit, new = int(self.tokenizer.model_max_length), self.settings.max_new_tokens
        if self.start is None:
            new = min(new, max(1, limit // 2))
            limit -= new
        if inputs.chat:
            turns = [json.loads(text) for text in inputs.prompts]
            texts = [self._chat(some, True, row) for row, some in enumerate(turns)]
        else:
            texts = [self._framed(text) for text in inputs.prompts]
        prompts = [self._prompt_ids(text, inputs.chat) for text in texts]
        if self.start is None:
            prompts = [prompt[-limit:] for prompt in prompts]
        else:
            prompts = [self._shortened(prompt, self._limit) for prompt in prompts]
        return generate(model, self.tokenizer, prompts, new)

    def answers(
        self,
        model: nn.Module,
        inputs: Inputs,
        outputs_of: Callable[[Encoded], Tensor],
        label_names: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """The response to every prompt, and the loss of the response that a row has."""
        assert isinstance(inputs, Dialogues)
        found = {"predicted_response": np.array(self.respond(model, inputs), dtype=object)}
        if inputs.responses is not None:
            encoded = self.encode(inputs)
            losses = encoded.losses(outputs_of(encoded), torch.zeros(len(encoded)))
            found["response_loss"] = losses.numpy()
        return found

    def answer_metrics(
        self, model: nn.Module, rows: Examples, outputs_of: Callable[[Encoded], Tensor]
    ) -> dict[str, float]:
        """Choice accuracy where there are choices, exact match where there is a pattern."""
        inputs = rows.inputs
        assert isinstance(inputs, Dialogues)
        found: dict[str, float] = {}
        if inputs.choices is not None and inputs.answers is not None:
            scores = self._choice_scores(inputs, inputs.choices, outputs_of)
            right = [
                int(np.argmax(some)) == int(answer)
                for some, answer in zip(scores, inputs.answers, strict=True)
                if some is not None
            ]
            if not right:
                raise InputError(
                    f"no row has choices that fit into {self._limit} tokens; raise train.max_length"
                )
            found["choice_accuracy"] = float(np.mean(right))
            if len(right) < len(scores):
                found["choice_rows"] = float(len(right))
        pattern = self.settings.answer_pattern
        if pattern is not None:
            some = inputs.take(np.arange(min(len(inputs), self.settings.answer_rows)))
            texts = some.responses or ()
            wanted = [find_answer(pattern, text) for text in texts]
            if some.choices is None and some.answers is not None:
                wanted = list(some.answers)
            made = [find_answer(pattern, text) for text in self.respond(model, some)]
            same = [same_answer(*pair) for pair in zip(made, wanted, strict=True)]
            found |= {"exact_match": float(np.mean(same)), "exact_match_rows": float(len(same))}
        return found

    def _choice_scores(
        self,
        inputs: Dialogues,
        choices: tuple[tuple[str, ...], ...],
        outputs_of: Callable[[Encoded], Tensor],
    ) -> list[np.ndarray | None]:
        """Log-probability of every choice after its prompt, by the sum or the mean over tokens.

        Choices are never cut: for all those of a row the prompt loses as much of its beginning as
        the longest of them needs. None for a row with a choice that has no room, or no token.
        """
        counts = np.array([len(some) for some in choices])
        owners, starts = np.repeat(np.arange(len(choices)), counts), np.cumsum(counts) - counts
        flat = [choice for some in choices for choice in some]
        asked = replace(inputs.take(owners), responses=flat, truth=None, choices=None, answers=None)
        ids = self._ids(asked)
        lengths = np.array([len(second) for _, second in ids])
        longest = np.maximum.reduceat(lengths, starts)
        fits = (np.minimum.reduceat(lengths, starts) > 0) & (longest <= self._limit)
        if self.start is None:
            fits &= longest < self._limit
        kept = np.flatnonzero(fits[owners])
        prompts, responses = [], []
        for place in kept:
            first, second = ids[place]
            if self.start is None:
                first = first[longest[owners[place]] - self._limit :]
            prompts.append(np.array(self._shortened(first, self._limit), dtype=np.int64))
            responses.append(np.array(second, dtype=np.int64))
        found: list[np.ndarray | None] = [None] * len(choices)
        if not len(kept):
            return found
        encoded = EncodedDialogues(prompts, responses, self.start, self._pad)
        outputs = outputs_of(encoded).numpy()  # (choices that fit, 3)
        scores = -outputs[:, 0]
        if self.settings.choice_score == "mean":
            scores = scores / outputs[:, 1]
        rows = np.flatnonzero(fits)
        for row, own in zip(rows, np.split(scores, np.cumsum(counts[rows])[:-1]), strict=True):
            found[row] = own
        return found


def find_answer(pattern: str, text: str) -> str | None:
    r"""The last match of a pattern, or of its first group, in a text; None without a match.

    >>> find_answer(r"answer is (\w+)", "the answer is A, no: the answer is B")
    'B'
    """
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return last.group(1 if last.re.groups else 0)


def same_answer(one: str | None, other: str | None) -> bool:
    """Whether two answers are the same number, or the same text but for case and space.

    >>> same_answer("1,200", "1200.0"), same_answer(" Yes", "yes"), same_answer(None, None)
    (True, True, False)
    """
    if one is None or other is None:
        return False
    numbers = [_number(text) for text in (one, other)]
    if None not in numbers:
        return math.isclose(float(numbers[0] or 0), float(numbers[1] or 0), rel_tol=1e-9)
    return " ".join(one.lower().split()) == " ".join(other.lower().split())


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").strip().removesuffix("."))
    except ValueError:
        return None


def _start_of(network: nn.Module) -> int | None:
    """The first token of the decoder, where the prompt has an encoder of its own."""
    if not is_encoder_decoder(network):
        return None
    config: Any = network.config
    start = config.decoder_start_token_id
    return int(config.pad_token_id if start is None else start)


def _width(rows: Sequence[np.ndarray]) -> int:
    return max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))


def _padded(rows: Sequence[np.ndarray], pad: int, width: int) -> Tensor:
    """(B, width) int64, padded on the right."""
    table = np.full((len(rows), width), pad, dtype=np.int64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row[:width]
    return torch.from_numpy(table)
