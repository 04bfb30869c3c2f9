"""Delta folders: `adapter_config.json`, `adapter_model.safetensors`, and `spectune.json`, which PEFT never reads.

What PEFT has is written in PEFT's layout and read from it; other programs' folders are read in `foreign/`. Weights are
safetensors only: nothing is ever unpickled. A folder may come from anybody: all of it is checked before the model is
touched.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spectune.deltas import BaseFacts, Delta, Method, check_can_attach, place, unplaced
from spectune.deltas.delta import AdapterFiles, ModuleDelta
from spectune.deltas.folder import CONFIG_FILE, OUR_FILE, DeltaFiles
from spectune.errors import DataError, SpectuneError, first_line, some
from spectune.families import Family, compare_bases, sample_differences
from spectune.files.metadata import read_json
from spectune.storage.foreign.foreign_folder import ForeignFolder
from spectune.storage.foreign.mlx_folder import fit_mlx, is_mlx, mlx_method
from spectune.storage.foreign.other_formats import is_adapter_hub, refuse_adapter_hub, refuse_folder, refuse_path
from spectune.storage.foreign.peft_folder import fit_peft, peft_method
from spectune.storage.manifest import FirstManifest, Manifest, check_digests, read_manifest

log = logging.getLogger("spectune")


def load_delta(model: PreTrainedModel, folder: str | Path, name: str | None = None, trainable: bool = False) -> Delta:
    """Attach the delta stored in `folder` (ours, PEFT's or mlx-lm's) to `model` and make it the active one.

    Of PEFT's folders the tensors say where the delta acts, as far as the config lets PEFT take them in; names that
    match nothing do not matter.

    Args:
        name: default is the folder's name.
        trainable: leave its weights open to training.

    Raises:
        DataError: no such folder, one of a format that is not read, a damaged file, another base's fingerprint,
            missing, surplus or misshapen tensors (all at once), weights that are not finite or not the ones that were
            saved. Nothing is attached then.
    """
    read = _checked(model, Path(folder), name)
    delta = place(
        model, read.method, read.name, fill=lambda d: read.files_of(d).read(read.folder),
        keep_base=read.method.trains_base, facts=read.facts,
    )  # fmt: skip
    if read.said is not None:
        log.warning("%s: %s", folder, read.said)
    for parameter in delta.parameters():
        parameter.requires_grad_(trainable)
    return delta


@dataclass(frozen=True, eq=False)
class StoredDelta:
    """A delta's folder, checked against a base.

    Attributes:
        draft: the delta, not on the model.
        foreign: what is understood of another program's folder; None of ours.
        facts: of the base.
        weights: all of them, in host memory; None where they are still to be read.
        nbytes: memory of the delta on the model, float32; 0 where they are still to be read.
    """

    folder: Path
    draft: Delta
    foreign: ForeignFolder | None
    facts: BaseFacts
    weights: dict[str, Tensor] | None = None
    nbytes: int = 0

    @property
    def method(self) -> Method:
        return self.draft.method

    @property
    def name(self) -> str:
        return self.draft.name

    @property
    def said(self) -> str | None:
        """What the user should know of another program's folder."""
        return None if self.foreign is None else self.foreign.said

    def files_of(self, delta: Delta) -> DeltaFiles:
        """How the folder is read into this delta."""
        if self.foreign is None:
            return delta.files
        assert isinstance(delta, ModuleDelta), "no other program's folder is read as a tuned base"
        return AdapterFiles(delta, self.foreign.weights, self.foreign.translate)

    def attach(self) -> Delta:
        """Put the delta on the model with the weights that were read, to be used and not trained; it is not made the
        active one. Raises ConfigError: its name is taken, or the base cannot take its method."""
        weights = self.weights
        assert weights is not None, "read_delta gives them"
        delta = place(
            self.draft.model, self.method, self.name, fill=lambda d: d.load_state_dict(weights), facts=self.facts,
            serving=True,
        )  # fmt: skip
        for parameter in delta.parameters():
            parameter.requires_grad_(False)
        return delta


def read_delta(model: PreTrainedModel, folder: Path, name: str) -> StoredDelta:
    """Read and check the delta stored in `folder`, to be attached as `name`; from any thread, for nothing of the model
    is changed. Raises DataError as `load_delta` does, and for a fully tuned model."""
    read = _checked(model, folder, name, beside_others=True)
    files = read.files_of(read.draft)
    assert isinstance(files, AdapterFiles), "what stands beside others has its own weights only"
    # copies: the reader's tensors are the file itself, which may be written to
    weights = {name: tensor.clone() for name, tensor in files.weights_of(folder).items()}
    return replace(read, weights=weights, nbytes=read.method.num_bytes(read.draft.family))


def _checked(
    model: PreTrainedModel, folder: Path, name: str | None, *, beside_others: bool = False
) -> StoredDelta:  # fmt: skip
    """The folder, as far as it can be checked without its weights being made. `beside_others`: a fully tuned model is
    refused."""
    if not folder.is_dir():
        raise refuse_path(folder)
    manifest, method, config = _described(folder)
    if beside_others and method.trains_base:
        raise DataError(
            f"{folder} is a fully tuned model ({method.label}), all of whose weights are its own: it cannot share a "
            f"base with others. Load it as a base of its own: spectune.load({str(folder)!r})"
        )
    name = name or folder.resolve().name
    check_can_attach(model, method, name)
    facts = BaseFacts()
    draft = unplaced(model, method, name, facts=facts)
    foreign = None
    if manifest is None:
        foreign = _fitted(folder, config, method, draft.family)
        draft = replace(draft, method=foreign.method)
        log.warning("%s is another program's, and says nothing of its base's weights: they are not compared", folder)
    else:
        _check_base(manifest, draft, folder)
    read = StoredDelta(folder, draft, foreign, facts)
    _check_files(read.files_of(draft), folder, OUR_FILE if manifest is not None else CONFIG_FILE)
    if manifest is not None:
        check_digests(manifest, draft.files.weight_files(folder))
    return read


def stored_method(folder: Path) -> Method:
    """The method of the delta stored in `folder` (ours or another program's); no weights are read, which may say more
    exactly where it acts. Raises DataError."""
    return _described(folder)[1]


def _described(folder: Path) -> tuple[Manifest | None, Method, dict[str, Any]]:
    """What a folder says of itself: in our file, or else in another program's, which is given too."""
    found = read_manifest(folder / OUR_FILE)
    if found is not None:
        return *found, {}
    config = read_json(folder / CONFIG_FILE, any_integer=True)
    if config is None:
        raise refuse_folder(folder)
    if "spectune_method" in config:
        raise DataError(
            f"{folder / OUR_FILE} is missing; {folder / CONFIG_FILE} alone does not describe this method: copy both"
        )
    if is_adapter_hub(config):
        raise refuse_adapter_hub(folder, config)
    return None, mlx_method(folder, config) if is_mlx(config) else peft_method(folder, config), config


def _fitted(folder: Path, config: dict[str, Any], method: Method, family: Family) -> ForeignFolder:
    return fit_mlx(folder, method, family) if is_mlx(config) else fit_peft(folder, config, method, family)


def _check_base(manifest: Manifest, draft: Delta, folder: Path) -> None:
    """Whether the model is the base that the delta was trained on: raises DataError, which says what differs; what is
    allowed and what could not be compared is logged."""
    if isinstance(manifest, FirstManifest):
        apart = sample_differences(manifest.base.model_dump(), draft.model, draft.family)
        log.warning(
            "%s was written by an earlier version of spectune, which recorded shapes, token embeddings and the last "
            "norm of its base: other linears would not be seen. Save it again to have all weights recorded.", folder,
        )  # fmt: skip
    else:
        found = compare_bases(manifest.base.as_dict(), draft.base_fingerprint)
        apart = found.changed
        if found.added:
            log.warning("%s was trained on this base without its added tokens: %s", folder, "; ".join(found.added))
        if found.unread:
            log.warning("%s: not compared with the base it was trained on: %s", folder, some(found.unread))
    if apart:
        raise DataError(f"{folder} was trained on another base ({manifest.base_name or 'of unknown name'})", apart)


def _check_files(files: DeltaFiles, folder: Path, config_file: str) -> None:
    """Check that the weights are what the config asks for, before any of either is made."""
    try:
        files.check(folder)
    except SpectuneError as error:
        if str(folder) in str(error):
            raise
        raise DataError(f"{folder / config_file} and the weights beside it do not fit this base: {error}") from error
    except Exception as error:  # sizes past 64 bits, a broken regular expression: torch and re have errors of their own
        raise DataError(
            f"{folder / config_file} describes what cannot be built ({first_line(error)}); copy it again"
        ) from error
