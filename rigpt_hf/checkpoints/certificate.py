"""Certificates: how far apart two models' logits are on stated inputs, and whether that is only rounding."""

import hashlib
import json
import math
import platform
import textwrap
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
import transformers
from torch import nn

from ..version import __version__
from .folder import named_file
from .logits import LogitsSnapshot, longest_of, random_input_ids, record_logits
from .routes import differing_routes
from .written import parse_json


CERTIFICATE_NAME = "certificate.json"
# The largest max |Δlogit| / max |logit| that is rounding. The only place where these numbers stand.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The part of it that may be of routers' logits: a root mean square, as rounding is noise and a wrong router is not. In
# bfloat16 right models have up to 0.48, and routers whose weights are off by 5 % from 0.61, see docs/families.md.
ROUTERS = 0.6
# Of a terminal that nobody made wider.
COLUMNS = 80
# Positions compared at a time, so that float64 copies of the logits stay small.
ROWS = 32
REPORT_IT = (
    "If the source's class changes its forward pass, it cannot be converted; otherwise please report it with the "
    "source's configuration."
)


class CertificateError(ValueError):
    """Two models that should be equal are not, or the inputs cannot tell."""


@dataclass(frozen=True)
class Certificate:
    """
    The difference between two models on stated inputs.

    Args:
        max_abs_logit_error (`float`): max |Δlogit|.
        max_abs_logit (`float`): max |logit| of the first model.
        relative_logit_error (`float`): the first divided by the second; what is compared with the tolerance.
        loss_a, loss_b (`float`): mean next-token loss in nats of the first and the second model on these inputs.
        loss_difference (`float`): `loss_b - loss_a`.
        dtype (`str`): of the second model's weights and arithmetic; source_dtype: of the first's.
        tolerance (`float`): of the coarser of the two dtypes.
        inputs (`dict`): shape, number of tokens compared, SHA-256 of the ids, the seed if they were drawn or what
            `text` they are of if that is known, and of positions and tokens of the vocabulary how many were `checked`,
            and how many there are.
        source, target (`str`): what was compared.
        versions (`dict[str, str]`): of Python and the libraries involved.
        weights_sha256 (`str`): of the second model's weights, see [`weights_sha256`]; nothing if they were not
            all in memory.
        routes_that_differ (`float`, *optional*): of models with experts, the part of all pairs of a token and a layer
            where the two models send the token to different experts. Rounding decides between experts of nearly the
            same probability, so this is more than 0 in few digits, and such logits differ by more than rounding.
        same_routes_error (`float`, *optional*): where routes differ, the relative error of the second model when it
            sends tokens where the first does, with the weights that its own routers then give.
        same_routes_router_error (`float`, *optional*): how far its routers' logits then are from the first model's,
            less their mean over experts, which says nothing: the root mean square of differences, as a part of that of
            the logits, in the layer where it is largest. At most `ROUTERS` times the tolerance is rounding.
    """

    max_abs_logit_error: float
    max_abs_logit: float
    relative_logit_error: float
    loss_a: float
    loss_b: float
    loss_difference: float
    dtype: str
    source_dtype: str
    tolerance: float
    inputs: dict[str, Any]
    source: str = ""
    target: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    weights_sha256: str = ""
    routes_that_differ: float | None = None
    same_routes_error: float | None = None
    same_routes_router_error: float | None = None

    @property
    def passed(self) -> bool:
        """
        Whether the relative error is within tolerance. Where routes of tokens to experts differ, whether it is on the
        routes of the first model, and the second model's routers are the first's up to rounding.
        """
        return self.relative_logit_error <= self.tolerance or self.passed_on_same_routes

    @property
    def passed_on_same_routes(self) -> bool:
        """Whether what differs on the same routes is rounding; not where no routes differ."""
        error, of_routers = self.same_routes_error, self.same_routes_router_error
        if error is None or of_routers is None:
            return False
        return error <= self.tolerance and of_routers <= ROUTERS * self.tolerance

    def check(self, explanation: str | None = None) -> "Certificate":
        """
        Itself, if it passed.

        Args:
            explanation (`str`, *optional*): what it means that it did not, and what to do.

        Raises:
            CertificateError: if it did not.
        """
        if not self.passed:
            routes = ""
            if self.routes_that_differ:
                routes = f" Of the routes of tokens to experts {self.routes_that_differ:.3%} differ"
                if self.same_routes_error is not None:
                    routes += (
                        f", and on the same routes `same_routes_error` is {self.same_routes_error:.3e} and "
                        f"`same_routes_router_error` {self.same_routes_router_error:.3e}, which may be "
                        f"{self.tolerance:.1e} and {ROUTERS * self.tolerance:.1e}"
                    )
                routes += "."
            raise CertificateError(
                f"`relative_logit_error` must be at most {self.tolerance:.0e} in {self.dtype}, got "
                f"{self.relative_logit_error:.3e} (max |Δlogit| {self.max_abs_logit_error:.3e}, Δloss "
                f"{self.loss_difference:+.3e}): the two models are not the same function.{routes} "
                f"{explanation or REPORT_IT}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything that there is, and `passed`, as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if value is not None} | {"passed": self.passed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Certificate":
        """
        The inverse of `to_dict`. Whatever follows from the rest is computed and not read: the relative error, the
        difference of the losses, the tolerance and `passed`.

        Raises:
            ValueError: if a field is missing, unknown or of another type, or a number is impossible.
        """
        try:
            certificate = cls(**{key: value for key, value in values.items() if key != "passed"})
            for each in fields(cls):
                value, kind = getattr(certificate, each.name), get_origin(each.type) or each.type
                kinds = get_args(each.type) if kind is UnionType else (kind,)
                if type(value) not in kinds and not (float in kinds and type(value) is int):
                    raise TypeError(f"`{each.name}` is {value!r:.80}")
            error, largest = certificate.max_abs_logit_error, certificate.max_abs_logit
            losses = certificate.loss_a, certificate.loss_b
            held = [getattr(certificate, name) or 0.0 for name in ("same_routes_error", "same_routes_router_error")]
            if (certificate.same_routes_error is None) != (certificate.same_routes_router_error is None):
                raise ValueError("one of `same_routes_error` and `same_routes_router_error` is missing")
            numbers = (error, largest, *losses, *held)
            if not all(map(math.isfinite, numbers)) or min(error, *held) < 0 or largest <= 0:
                raise ValueError(f"the numbers {numbers} are not those of two models")
            return replace(
                certificate,
                relative_logit_error=error / largest,
                loss_difference=losses[1] - losses[0],
                tolerance=tolerance_of(certificate.dtype, certificate.source_dtype),
            )
        except (TypeError, ArithmeticError, AttributeError, LookupError) as fault:
            raise ValueError(f"`values` must be those of a certificate, got {fault}.") from fault

    def to_json(self) -> str:
        """The text of the file that [`save`] writes."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write `certificate.json` into a folder, in the place of nothing or of one of this program's; its path."""
        path = Path(folder) / CERTIFICATE_NAME
        with named_file(path, "folder") as place:
            place.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Certificate":
        """Read `certificate.json` from a folder."""
        return cls.from_dict(parse_json((Path(folder) / CERTIFICATE_NAME).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        shape = " x ".join(str(size) for size in self.inputs["shape"])
        drawn = f"random, seed {self.inputs['seed']}" if "seed" in self.inputs else self.inputs.get("text", "given")
        # On random tokens every model loses about the logarithm of its vocabulary, which looks broken unexplained.
        loss = "loss on random tokens" if "seed" in self.inputs else "loss"
        checked: dict[str, list[int]] = self.inputs.get("checked", {})
        whole = all(count == of for count, of in checked.values())
        dtypes = self.dtype if self.dtype == self.source_dtype else f"{self.source_dtype} -> {self.dtype}"
        verdict, same = "equal up to rounding", ""
        if self.relative_logit_error > self.tolerance:
            verdict += " and the routes that it turns"
        verdict += "" if whole else ", where checked"
        if self.same_routes_error is not None:
            same = f"relative {self.same_routes_error:.3e}, routers {self.same_routes_router_error:.3e}"
        rows = {
            "verdict": verdict if self.passed else "NOT EQUAL",
            "max |Δlogit|": f"{self.max_abs_logit_error:.3e}",
            "relative to max |logit|": f"{self.relative_logit_error:.3e}  (tolerance {self.tolerance:.0e})",
            loss: f"{self.loss_a:.6f} -> {self.loss_b:.6f}  (difference {self.loss_difference:+.3e})",
            "routes": "" if self.routes_that_differ is None else f"{self.routes_that_differ:.3%} differ",
            "on the same routes": same,
            "dtype": dtypes,
            "inputs": f"{shape} tokens, {drawn}, sha256 {self.inputs['sha256'][:12]}",
            "checked": ", ".join(f"{count:,} of {of:,} {name}" for name, (count, of) in checked.items()),
            "source": self.source,
            "target": self.target,
            "weights": f"of the target, sha256 {self.weights_sha256[:12]}" if self.weights_sha256 else "",
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        width = max(map(len, rows)) + 4
        # A path stays in one line, to be copied.
        folded = {
            name: value if value in (self.source, self.target) else _folded(value, width)
            for name, value in rows.items()
        }
        lines = [f"  {name:<{width - 2}}{value}" for name, value in folded.items() if value]
        return "\n".join(["Certificate", *lines])


def _folded(value: str, width: int) -> str:
    """A value behind `width` characters in lines of at most `COLUMNS`, but for longer words, such as paths."""
    lines = textwrap.wrap(value, COLUMNS - width, break_on_hyphens=False, break_long_words=False)
    return f"\n{' ' * width}".join(lines)


def tolerance_of(*dtypes: str) -> float:
    """The tolerance of the coarsest of some dtypes by name; a `KeyError` if one has none."""
    named = {str(dtype): tolerance for dtype, tolerance in TOLERANCES.items()}
    return max(named[f"torch.{dtype.removeprefix('torch.')}"] for dtype in dtypes)


def compare(
    a: LogitsSnapshot,
    b: LogitsSnapshot,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    source: str = "",
    target: str = "",
    seed: int | None = None,
    names: tuple[str, str] = ("a", "b"),
    positions: int | None = None,
) -> Certificate:
    """
    The certificate of two records on the same inputs; arguments as in [`certify`], `names` for error messages, and
    `positions`, how many the models have.

    Raises:
        CertificateError: if the comparison would say nothing: logits that are not finite, or all the same.
        ValueError: if the shapes of the logits differ.
    """
    if a.logits.shape != b.logits.shape:
        raise ValueError(
            f"`a` and `b` must give logits of the same shape, got {list(a.logits.shape)} and {list(b.logits.shape)}. "
            "Compare models with the same vocabulary."
        )
    ids = input_ids.cpu()
    kept = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    logits_a, logits_b = a.logits[kept], b.logits[kept]  # [tokens, V]
    for name, said, logits in ((names[0], source, logits_a), (names[1], target, logits_b)):
        kind = str(logits.dtype).removeprefix("torch.")
        if not bool(torch.isfinite(logits).all()):
            raise CertificateError(
                f"`{name}` must give finite logits to be certified, got NaN or infinity of {said or 'it'}: numbers "
                f"leave the range of {kind} on the way. Take a `dtype` with more range, or see whether weights are "
                "damaged."
            )
        if logits.numel() == 0 or (logits is logits_a and float(logits.max()) == float(logits.min())):
            raise CertificateError(
                f"`{name}` must tell tokens apart to be certified, got the same logit for everything of "
                f"{said or 'it'}, as of any model without weights, or whose numbers leave the range of {kind} on the "
                "way. Use a model with weights of ordinary size, and inputs of several tokens."
            )
    max_logit = max(float(rows.to(torch.float64).abs().max()) for rows in logits_a.split(ROWS))
    error, held = largest_difference(logits_a, logits_b), None
    if b.on_same_routes is not None:
        held = largest_difference(logits_a, b.on_same_routes[kept]) / max_logit
    loss_a, loss_b = (next_token_loss(logits, ids, kept) for logits in (a.logits, b.logits))
    inputs: dict[str, Any] = {
        "shape": list(ids.shape),
        "tokens": int(kept.sum()),
        "sha256": hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest(),
    }
    if seed is not None:
        inputs["seed"] = seed
    if positions is not None:
        # A padded position is none that was looked at.
        places, tokens = int(kept.any(0).sum()), len(ids[kept].unique())
        inputs["checked"] = {
            "positions": [places, positions],
            "tokens of the vocabulary": [tokens, a.logits.shape[-1]],
        }
    return Certificate(
        max_abs_logit_error=error,
        max_abs_logit=max_logit,
        relative_logit_error=error / max_logit,
        loss_a=loss_a,
        loss_b=loss_b,
        loss_difference=loss_b - loss_a,
        dtype=str(b.dtype).removeprefix("torch."),
        source_dtype=str(a.dtype).removeprefix("torch."),
        tolerance=tolerance_of(str(a.dtype), str(b.dtype)),
        inputs=inputs,
        source=source,
        target=target,
        versions=library_versions(),
        weights_sha256=b.weights_sha256,
        routes_that_differ=differing_routes(a.routes, b.routes, kept.flatten()),
        same_routes_error=held,
        same_routes_router_error=b.router_error,
    )


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |Δ| of two tables of logits `[tokens, V]`, in float64."""
    parts = zip(a.split(ROWS), b.split(ROWS), strict=True)
    return max(float((rows.to(torch.float64) - others.to(torch.float64)).abs().max()) for others, rows in parts)


def next_token_loss(logits: torch.Tensor, input_ids: torch.Tensor, kept: torch.Tensor) -> float:
    """Mean of `-log p(next token)` in nats over the pairs of neighbouring tokens that both count; 0 without pairs."""
    pairs = kept[:, :-1] & kept[:, 1:]
    if not bool(pairs.any()):
        return 0.0
    predicted, tokens = logits[:, :-1][pairs], input_ids[:, 1:][pairs]
    total = 0.0
    for rows, labels in zip(predicted.split(ROWS), tokens.split(ROWS), strict=True):
        total += float(nn.functional.cross_entropy(rows.to(torch.float64), labels, reduction="sum"))
    return total / len(tokens)


def certify(
    a: Any,
    b: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    seed: int = 0,
) -> Certificate:
    """
    Compare the logits of two causal language models.

    Args:
        a, b (`PreTrainedModel`): the models; `a` sets the scale. Tokens that only one of them has are left out.
        input_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*): drawn at random from `seed` if not given.
        attention_mask (`torch.Tensor` of shape `[batch, seq]`, *optional*): positions with 0 are not compared.
        seed (`int`, defaults to 0): for the random inputs.

    Returns:
        `Certificate`: its `passed` says whether the difference is rounding; `check()` raises where it is not.

    Raises:
        CertificateError: if the logits are not finite, or all the same.

    Example:

    ```python
    >>> certificate = certify(gpt2, convert_model(gpt2))
    >>> certificate.passed
    True
    ```
    """
    drawn = input_ids is None
    longest = min(longest_of(a.config), longest_of(b.config))
    tokens = min(a.config.vocab_size, b.config.vocab_size)
    if input_ids is None:
        input_ids = random_input_ids(tokens, longest, seed=seed)
    first = record_logits(a, input_ids, attention_mask, hashed=False)
    return compare(
        first.of_tokens(tokens),
        record_logits(b, input_ids, attention_mask, like=first).of_tokens(tokens),
        input_ids,
        attention_mask,
        source=type(a).__name__,
        target=type(b).__name__,
        seed=seed if drawn else None,
        positions=longest,
    )


def library_versions() -> dict[str, str]:
    """Versions of everything that computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rigpt_hf": __version__,
    }
