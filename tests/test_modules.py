"""Torch modules as classifiers: where they are split, and that nothing changes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from noiseproof.errors import InputError
from noiseproof.features import fingerprint
from noiseproof.models import encoder_of, head_modules, is_head, row_statistics
from noiseproof.modules import SplitModule, WholeModule, logits_in, numbered_classes, wrap_module

LABELS = ["a", "b", "c"]
ROWS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


class Deep(nn.Module):
    """Two layers; the last may stand anywhere in it, and be followed by something."""

    def __init__(self, after: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
        self.after = after or nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        return self.after(self.inner(rows))


def wrapped(module: nn.Module) -> SplitModule | WholeModule:
    return wrap_module(module, LABELS, "features", ROWS)


def test_a_last_linear_layer_is_the_head() -> None:
    """The parts have the names that methods ask for, and the answer stays the same."""
    module = Deep()
    split = wrapped(module)
    assert isinstance(split, SplitModule)
    assert encoder_of(split)[0] == "encoder" and head_modules(split) == ["classifier"]
    head = is_head(split)
    trained = {name for name, _ in split.named_parameters() if head(name)}
    assert trained == {"classifier.weight", "classifier.bias"}
    assert split.config.hidden_size == 4 and split.config.num_labels == 3
    torch.testing.assert_close(split(features=ROWS).logits, module(ROWS))
    torch.testing.assert_close(split.plain()(ROWS), module(ROWS))
    assert split.plain().state_dict().keys() == module.state_dict().keys()


class Auxiliary(Deep):
    """It has more layers of as many classes, which have no part in its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 3)
        self.used = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Any:
        logits = self.inner(rows)
        return {"logits": logits, "more": self.used(rows)}


class Giving(nn.Module):
    """It answers with its features, and its head is all that stands behind them."""

    def __init__(self, before: nn.Module | None = None, as_object: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.before = before or nn.Identity()
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.after = nn.Linear(3, 2)
        self.as_object = as_object

    def forward(self, rows: Tensor) -> Any:
        features = self.body(rows)
        logits = self.head(self.before(features))
        found = {"features": features, "logits": logits, "coarse": self.after(logits)}
        return type("Output", (), found)() if self.as_object else found


def test_a_layer_that_is_declared_last_need_not_be_the_head() -> None:
    """It would take the probe from the module without a word."""
    torch.manual_seed(1)
    module = Auxiliary()
    split = wrapped(module)
    assert isinstance(split, SplitModule) and split.config.hidden_size == 4
    torch.testing.assert_close(split(features=ROWS).logits, module(ROWS)["logits"])
    assert torch.equal(split.classifier.weight, module.inner[2].weight)


@pytest.mark.parametrize("as_object", [False, True])
def test_features_that_are_given_are_those_of_the_head(as_object: bool) -> None:
    """Split at its last layer, the fresh layers before it would be frozen with the encoder."""
    module = Giving(as_object=as_object)
    split = wrapped(module)
    assert isinstance(split, SplitModule) and split.config.hidden_size == 4
    assert [type(part) for part in split.classifier] == [type(part) for part in module.head]
    read = split.encoder(features=ROWS)
    torch.testing.assert_close(read, module.body(ROWS))
    torch.manual_seed(2)
    wanted = logits_in(module.train()(ROWS))
    torch.manual_seed(2)
    torch.testing.assert_close(split.train()(features=ROWS).logits, wanted)
    head = is_head(split)
    trained = {name for name, _ in split.named_parameters() if head(name)}
    assert trained == {f"classifier.{n}.{kind}" for n in (1, 3) for kind in ("weight", "bias")}
    plain = split.plain().eval()
    assert plain.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(logits_in(plain(ROWS)), logits_in(module.eval()(ROWS)))


@pytest.mark.parametrize("before", [nn.Dropout(0.5), nn.Tanh()])
def test_features_that_the_head_does_not_read_as_they_are_are_not_taken(before: nn.Module) -> None:
    """Dropout before the head would be lost without a trace in evaluation."""
    split = wrapped(Giving(before))
    assert not isinstance(split, SplitModule) or not split.encoder.split.given


def test_encoders_of_equal_weights_are_told_apart_by_what_they_compute() -> None:
    """A number in the code is no weight; features of other code would be wrong in silence."""

    class Scaled(Deep):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(self.scale * rows)

    prints = []
    for scale in (1.0, 1.0, 2.0):
        torch.manual_seed(0)
        prints.append(fingerprint(wrapped(Scaled(scale))))
    assert prints[0] and prints[0] == prints[1] != prints[2]
    torch.manual_seed(0)
    other = type("Scaled", (Scaled,), {"__module__": "elsewhere"})(1.0)  # of no file
    assert fingerprint(wrapped(other)) == ""
    with torch.no_grad():
        blind = Deep()
        blind.inner[0].weight.zero_()
    assert fingerprint(wrapped(blind)) == ""


class Twice(Deep):
    """Its last layer reads many vectors a row, and what follows is not linear."""

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(torch.stack([rows, -rows], dim=1)).amax(1)


def silent() -> Deep:
    """A head that starts from 0, with something behind it that leaves 0 as it is."""
    module = Deep(nn.Tanh())
    for parameter in module.inner[2].parameters():
        nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize("module", [Deep(nn.Tanh()), Deep(nn.Linear(3, 3)), Twice(), silent()])
def test_a_split_that_would_change_the_answer_is_not_made(module: nn.Module) -> None:
    """A non-linearity behind the layer, or many vectors a row: features would not be one vector."""
    whole = wrapped(module)
    torch.testing.assert_close(whole(features=ROWS).logits, module(ROWS))
    if isinstance(whole, SplitModule):  # Linear(3, 3) is itself the last layer
        assert whole.config.hidden_size == 3
    else:
        with pytest.raises(InputError, match="tune=full"):
            encoder_of(whole)


def test_the_module_that_was_given_is_not_touched() -> None:
    """Its owner may use it for the next run."""
    module = Deep()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    split = wrapped(module.train())
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.add_(1)
    assert module.training and isinstance(module.inner[2], nn.Linear)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_are_saved_under_the_modules_own_names(tmp_path: Path) -> None:
    """So that plain torch loads them; shared ones are written as often as they have names."""
    module = Deep()
    for place, one in enumerate((wrapped(module), wrapped(Deep(nn.Tanh())))):
        one.save_pretrained(str(tmp_path / str(place)))
        found = load_file(tmp_path / str(place) / "model.safetensors")
        assert found.keys() == module.state_dict().keys()
    tied = Deep()
    tied.inner[0].bias = nn.Parameter(torch.zeros(4))
    tied.again = tied.inner  # type: ignore[assignment]
    wrapped(tied).save_pretrained(str(tmp_path / "tied"))
    tied.load_state_dict(load_file(tmp_path / "tied" / "model.safetensors"))


@pytest.mark.parametrize(
    "answer",
    [ROWS, (ROWS, 1), [ROWS], {"logits": ROWS}, type("Output", (), {"logits": ROWS})()],
)
def test_logits_are_found_in_whatever_is_answered(answer: Any) -> None:
    assert logits_in(answer) is ROWS


@pytest.mark.parametrize("answer", [None, {}, {"output": ROWS}, (), "logits"])
def test_an_answer_without_logits_is_told(answer: Any) -> None:
    with pytest.raises(InputError, match="expected logits: a tensor"):
        logits_in(answer)


def test_a_module_without_classes_of_ours_has_numbers_for_them() -> None:
    assert numbered_classes(Deep(), ROWS) == ["0", "1", "2"]


def test_a_single_row_is_normalised_by_running_statistics() -> None:
    """It has no variance: BatchNorm would fail at the end of an epoch."""
    net = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).train()
    before = net[0].running_mean.clone()
    with pytest.raises(ValueError, match="more than 1 value"):
        net(ROWS[:1])
    with row_statistics(net, 1):
        answer = net(ROWS[:1])
    torch.testing.assert_close(answer, net.eval()(ROWS[:1]))
    assert torch.equal(net[0].running_mean, before)
    net.train()
    with row_statistics(net, 2):
        net(ROWS)
    assert net[0].training and not torch.equal(net[0].running_mean, before)
