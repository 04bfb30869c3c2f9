"""Whether a checkpoint holds the weights that its config describes: all of them, and none of the decoder's beside.

Asked twice. Before anything is allocated, of the files' headers and a model without weights: a config that lies about
sizes costs nothing then. And of transformers, once it has read them: it renames and joins tensors by rules of its own,
so only it can say which weights it found nowhere.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectune.errors import DataError, some
from spectune.files.tensor_headers import WHOLE_NUMBERS
from spectune.storage.base_files import Weights

log = logging.getLogger("spectune")

ALLOW = (
    "copy the base again from where it was written, or have config.json fit it; --allow-missing-weights "
    "(allow_missing_weights=True) begins them at random"
)
#: parts of models of more than text, and of decoding several tokens at once, which stand beside a decoder
_BESIDE = re.compile(
    r"vision|visual|image|audio|speech|video|talker|token2wav|multi_?modal|mm_|project(or|ion)|connector|resampler|"
    r"mtp|nextn|eagle|medusa"
)
#: buffers that earlier versions of transformers saved: masks, and what positions are made of
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|masked_bias|inv_freq|rotary_emb\.\w+|rotary_pos_emb\.\w+|freqs_cis|"
    r"embed_positions|causal_mask|attn_mask|num_batches_tracked)$"
)
#: what checkpoints in few bits have beside weights
_OF_QUANTISED = re.compile(
    r"(scales?|scale_inv|zeros?|zero_points?|g_idx|bias|absmax|quant_map|state|bitsandbytes\w*)$"
)
#: bytes of buffers that a model may have for its weights' bytes: masks and tables by the config's positions
_MOST_BUFFERS = 2**30


@dataclass(frozen=True)
class Account:
    """What a base is, and what is wanted of it.

    Attributes:
        source: its name, for messages.
        weights: what its files say.
        quantised: its checkpoint is in few bits, so that tensors in the files are no weights by themselves.
        allow_missing: weights that are not there may begin at random.
        seed: of what begins at random.
    """

    source: str
    weights: Weights
    quantised: bool
    allow_missing: bool
    seed: int

    def check_headers(self, empty: PreTrainedModel) -> None:
        """Check the files against a model without weights, before any is made. Raises DataError: weights are no
        numbers, or the model has more of them than the files, or buffers that no such model has."""
        own = dict(empty.named_parameters())
        headers = self.weights.headers or {}
        buffers = sum(buffer.nbytes for buffer in empty.buffers())
        if buffers > max(_MOST_BUFFERS, 4 * self.weights.nbytes):
            raise DataError(
                f"{self.source}: config.json describes a model with tables and masks of {buffers:,} bytes beside "
                f"{self.weights.nbytes:,} bytes of weights: it is damaged; copy it again from where it was written"
            )
        if self.quantised:
            return
        whole = [n for n, header in headers.items() if header.dtype in WHOLE_NUMBERS and n in own]
        if wrong := [f"{name} ({headers[name].dtype})" for name in whole if own[name].is_floating_point()]:
            raise DataError(f"{self.source}: {self.weights.names} holds weights that are whole numbers: {some(wrong)}; "
                            "it is damaged: copy it again from where it was written")  # fmt: skip
        # beside the base model is its head, which may be new
        inner = getattr(empty, empty.base_model_prefix, None)
        wanted = sum(parameter.numel() for parameter in inner.parameters()) if inner is not None else 0
        if wanted <= self.weights.most_weights or self.allow_missing:
            return
        other = [f"{name} is {list(header.shape)}, and the config makes it {list(own[name].shape)}"
                 for name, header in headers.items()
                 if name in own and tuple(own[name].shape) != header.shape]  # fmt: skip
        lacking = [name for name in own if name not in headers]
        said = some(other) if other else f"it lacks {some(lacking)}" if headers else "it is too small"
        raise DataError(
            f"{self.source}: config.json describes a model of {wanted:,} weights, and {self.weights.names} has at most "
            f"{self.weights.most_weights:,}: {said}; {ALLOW}"
        )

    def check_found(
        self, model: PreTrainedModel, found: Mapping[str, Any], empty: PreTrainedModel, head: tuple[str, ...] = ()
    ) -> list[str]:
        """Check what transformers found once it read the files. Returns the weights of a head that begin at random.

        Args:
            found: its `output_loading_info`.
            head: what names of weights begin with that may be new.

        Raises:
            DataError: weights are missing, or have other shapes, and may not; or the files hold tensors of the decoder
                that the model has no place for.
        """
        shapes = {name: f"{name} ({list(there)}, and the config makes it {list(here)})"
                  for name, there, here in found["mismatched_keys"]}  # fmt: skip
        new = [name for name in {*found["missing_keys"], *shapes} if name.startswith(head)]
        missing = sorted({*found["missing_keys"]} - {*new})
        misfits = [shapes[name] for name in sorted({*shapes} - {*new})]
        surplus = sorted(found["unexpected_keys"])
        of_decoder = [name for name in surplus if self._of_decoder(name, model, head)]
        if (missing or misfits) and not self.allow_missing:
            said = [f"lacks weights of the base: {some(missing)}"] if missing else []
            said += [f"has weights of another shape: {some(misfits)}"] if misfits else []
            raise DataError(f"{self.source}: {self.weights.names} {', and '.join(said)}; {ALLOW}")
        if of_decoder and not self.allow_missing:
            raise DataError(
                f"{self.source}: {self.weights.names} has weights that the model of config.json has no place for: "
                f"{some(of_decoder)}. Without them it is another model: have config.json fit the weights; "
                "--allow-missing-weights (allow_missing_weights=True) leaves them out"
            )
        self._tell([*missing, *misfits], surplus, of_decoder)
        self._tell_of_ties(model, empty)
        return sorted(new)

    def _tell(self, begun: list[str], surplus: list[str], of_decoder: list[str]) -> None:
        """Say what was allowed, and what was passed over."""
        if begun:
            log.warning("%s: not in %s, and so they begin at random (seed %d): %s", self.source, self.weights.names,
                        self.seed, some(begun))  # fmt: skip
        if of_decoder:
            log.warning("%s: left out, though they are the decoder's: %s", self.source, some(of_decoder))
        if others := [name for name in surplus if name not in of_decoder]:
            log.info("%s: left out, as they are of other parts than the decoder: %s", self.source, some(others))

    def _tell_of_ties(self, model: PreTrainedModel, empty: PreTrainedModel) -> None:
        """Say where weights that the config has as one are two in the files."""
        tied = getattr(empty, "all_tied_weights_keys", None) or {}
        now = dict(model.named_parameters(remove_duplicate=False))
        apart = [f"{one} and {other}" for one, other in tied.items()
                 if one in now and other in now and now[one] is not now[other]]  # fmt: skip
        if apart:
            log.warning(
                "%s: config.json has these weights as one (tie_word_embeddings), and %s holds two that differ; both "
                "are taken as they are: %s", self.source, self.weights.names, some(apart),
            )  # fmt: skip

    def _of_decoder(self, name: str, model: PreTrainedModel, head: tuple[str, ...]) -> bool:
        """Whether a tensor that has no place in the model belongs to its decoder: it stands in a module that the model
        has, or under its base model, and is no buffer and no tower beside it."""
        prefix, header = model.base_model_prefix, (self.weights.headers or {}).get(name)
        of_mask = header is not None and len(header.shape) == 4 and header.shape[:2] == (1, 1)
        if _BUFFERS.search(name) or of_mask or (self.quantised and _OF_QUANTISED.search(name)):
            return False
        modules = {path for path, _ in model.named_modules()} - {""}
        buffers = {path for path, _ in model.named_buffers()}
        # checkpoints of the base model alone are without its prefix; what is beside it is, too
        whole = name.startswith(f"{prefix}.")
        for place in [name] if whole or not prefix else [name, f"{prefix}.{name}"]:
            parts = place.split(".")
            above = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
            nearest = next((path for path in above if path in modules), "")
            if not nearest or place in buffers or place.startswith(head) or (nearest == prefix and not whole):
                continue
            return not _BESIDE.search(place[len(nearest) :])
        return False


def check_numbers(source: str, model: PreTrainedModel) -> None:
    """Raise DataError where weights are not finite numbers. Reads each once, on the device where it is."""
    wrong = [name for name, weight in model.named_parameters() if not _finite(weight.detach())]
    if wrong:
        raise DataError(
            f"{source}: NaN or infinite weights, which make every answer NaN: {some(wrong)}. The base is damaged, or "
            "its training diverged: copy it again from where it was written"
        )


def _finite(weight: Tensor) -> bool:
    if weight.device.type == "meta" or not weight.is_floating_point() or weight.itemsize < 2 or not weight.numel():
        return True
    least, most = torch.aminmax(weight)  # NaN if any is
    return bool(torch.isfinite(least) & torch.isfinite(most))
