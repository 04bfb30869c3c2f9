"""`spectune.json`: what a delta's folder says of itself, and the digests of its weights, checked on reading."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from spectune.deltas import Method
from spectune.deltas.folder import BASE_NAME, CONFIG_FILE, FORMAT, OUR_FILE, config_sha256
from spectune.errors import DataError, SpectuneError
from spectune.families import is_whole
from spectune.files.digests import Digest, check_files
from spectune.files.metadata import SEAL, Seal, read_json, seal_of
from spectune.files.weights import need_weights
from spectune.methods import method_from_dict

_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
_WeightsName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$")]


class _Strict(BaseModel):
    """JSON types as they are: no text for a number, no `true` for 1. Keys of later versions are left alone."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class BaseSamples(_Strict):
    """What format 1 has of a base, see `spectune.families.sample_differences`."""

    model_type: str
    parts_sha256: str
    samples: dict[str, list[float]]


class Part(_Strict):
    """What a fingerprint has of one weight of a base, see `spectune.families.fingerprint`; no digests of one that could
    not be read."""

    kind: str
    shape: list[Annotated[int, Field(ge=0)]] = Field(max_length=8)
    stored_as: str
    same_as: str | None = None
    digests: list[Annotated[str, Field(pattern="^[0-9a-f]{16}( [0-9a-f]{16}){2}$")]] | None = None
    tail: list[Annotated[str, Field(pattern="^[0-9a-f]{8}( [0-9a-f]{8}){2}$")]] | None = None
    rms: float | None = None
    #: of 8 numbers of 16 bits, or several times as many
    sums: Annotated[str, Field(pattern="^([A-Za-z0-9+/]{64})*([A-Za-z0-9+/]{22}==|[A-Za-z0-9+/]{43}=)?$")] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.digests is not None and not is_whole(self.model_dump(exclude_none=True)):
            raise ValueError("its digests and sums are not those of a weight of this shape")
        return self


class Base(_Strict):
    """A base's fingerprint, see `spectune.families.fingerprint`."""

    model_type: str
    decoder: str
    parts: dict[str, Part]

    @model_validator(mode="after")
    def _are_tied(self) -> Self:
        for name, part in self.parts.items():
            other = self.parts.get(part.same_as or name)
            if other is None or (part.same_as is not None and (other.same_as is not None or other.shape != part.shape)):
                raise ValueError(f"{name} is the same as {part.same_as}, which is no such weight")
        return self

    def as_dict(self) -> dict[str, Any]:
        """As `fingerprint` gives it."""
        return self.model_dump(exclude_none=True)


class Manifest(_Strict):
    """The content of `spectune.json`."""

    format: int
    method: dict[str, Any]
    base: Base
    base_name: str | None = None
    trained_as: dict[str, Any] | None = None
    text_positions_start_at: int | None = None
    parameters: int | None = None
    versions: dict[str, str] | None = None
    #: by file name; folders written before this key have none
    weights: dict[_WeightsName, Digest] | None = None
    #: of the other files that the save wrote, such as `adapter_config.json`
    digests: dict[_FileName, Digest] | None = None
    #: of `adapter_config.json`, see `spectune.deltas.folder.config_sha256`
    config_sha256: str | None = None
    #: of the folder, all that the save wrote
    files: list[str] | None = None
    _seal: Seal = PrivateAttr(Seal.ABSENT)


class FirstManifest(Manifest):
    """The content of a `spectune.json` of format 1."""

    base: BaseSamples  # type: ignore[assignment]


def read_manifest(path: Path) -> tuple[Manifest, Method] | None:
    """A folder's `spectune.json` and the method it describes; None where there is none. Raises DataError: it is
    damaged, of another format, or its method is none of ours; everything wrong is listed."""
    content = read_json(path, any_integer=True)  # the model says of which key it is too large
    if content is None:
        return None
    version = content.get("format")
    if isinstance(version, int) and version not in (1, FORMAT):
        raise DataError(
            f"{path} has format {version}, this spectune reads 1 and {FORMAT}; install the version that wrote it"
        )
    try:
        manifest = (FirstManifest if version == 1 else Manifest).model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is not what Delta.save writes; copy the folder again", explain(error)) from None
    if version == FORMAT:  # format 1 had no seal
        manifest._seal = seal_of({key: value for key, value in content.items() if key != BASE_NAME})
    method = _method(path, manifest)
    starts_at = manifest.text_positions_start_at
    if starts_at is not None and starts_at != method.virtual_tokens:
        raise DataError(
            f"{path}: text_positions_start_at is {starts_at}, but its method has {method.virtual_tokens} virtual "
            "tokens; copy the folder again"
        )
    return manifest, method


def _method(path: Path, manifest: Manifest) -> Method:
    fields = manifest.method
    try:
        # as lenient as everywhere, for its messages; then as strict as JSON can be, where nothing was typed by hand
        method = method_from_dict(fields)
        type(method).model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise DataError(f"{path}: its method has values of a wrong type", explain(error)) from None
    except SpectuneError as error:
        raise DataError(f"{path}: its method cannot be read; copy the folder again", str(error).splitlines()) from None
    except Exception as error:  # what a method's own checks raise on values that nobody would type
        raise DataError(f"{path}: its method cannot be read ({error}); copy the folder again") from error
    return method.as_stored()


def check_digests(manifest: Manifest, files: Iterable[Path]) -> None:
    """Compare a folder's files with what they were when saved, and what it says of itself with its seal; nothing to
    compare where the key `weights` is not there, as in folders of the first versions, or was taken out. Raises
    DataError: a file is missing, is not listed, or was changed; all of them are named."""
    if manifest.weights is None:
        return
    present = {path.name: path for path in files}
    folder = next(iter(present.values())).parent
    for name in manifest.weights:
        need_weights(folder / name)
    problems = [f"{name}: is not listed in {OUR_FILE}" for name in present if name not in manifest.weights]
    try:
        check_files(folder, {**manifest.weights, **(manifest.digests or {})}, "")
    except DataError as error:
        problems += error.problems
    if manifest.config_sha256 not in (None, config_sha256(folder / CONFIG_FILE)):
        problems.append(f"{CONFIG_FILE}: is not the one that was written")
    if manifest._seal is Seal.WRONG:
        problems.append(f"{OUR_FILE}: its content does not fit its key {SEAL!r}")
    if problems:
        raise DataError(
            f"{folder}: the weights, or what is said of them, are not what was saved. Copy the folder again; or, if "
            f"they were changed on purpose, take the key 'weights' out of {folder / OUR_FILE}",
            problems,
        )


def explain(error: ValidationError) -> list[str]:
    """One line for each thing that is wrong: the key, what was given, what is expected."""
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        given = "" if problem["type"] == "missing" else f" = {problem['input']!r}"
        lines.append(f"{key}{given[:80]}: {problem['msg']}")
    return lines
