"""Released weights by name, and what stands beside them. Importing this module needs no torch.

`timm:NAME` is the repository `timm/NAME` of the Hugging Face hub, where timm keeps its weights;
`hf:OWNER/NAME` is any. Files are taken from the cache that timm, transformers and huggingface_hub
share, without a look at the network where they are there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

#: what `find` understands
SCHEMES = {"timm:": "timm/", "hf:": ""}
WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: where the cache keeps a repository of timm's, whose name is that of an architecture and weights
_OF_TIMM = re.compile(r"models--timm--([^/\\]+)[/\\]snapshots[/\\]")
#: what a stage or `save_encoder` calls an encoder of this project
_OURS = "vit"


class CheckpointError(ValueError):
    """A file that cannot be loaded as an encoder; the message says what was expected."""


def is_name(init: str) -> bool:
    """Return whether `init` names weights of a hub, not a file."""
    return init.startswith(tuple(SCHEMES))


def find(name: str) -> Path:
    """Return the file that `timm:NAME` or `hf:OWNER/NAME` means, with its config.json beside it.

    `@REVISION` may follow: a branch, tag or commit. Files that are not in the cache are fetched.
    Raises CheckpointError where that is not possible.
    """
    import huggingface_hub as hub

    scheme = next(start for start in SCHEMES if name.startswith(start))
    repository, _, revision = name.removeprefix(scheme).partition("@")
    repository = SCHEMES[scheme] + repository
    reason = ""
    for offline in (True, False):
        for file in (WEIGHTS, "pytorch_model.bin"):
            options: Any = {"revision": revision or None, "local_files_only": offline}
            try:
                found = Path(hub.hf_hub_download(repository, file, **options))
            except hub.errors.HFValidationError as error:
                raise CheckpointError(f"{name}: {str(error).splitlines()[0]}") from None
            except Exception as error:  # what a network makes of its reader is without limit
                reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
                missing = isinstance(error, hub.errors.EntryNotFoundError)
                if not offline and (not missing or isinstance(error, FileNotFoundError)):
                    break  # no network: another file is no nearer
                continue
            try:
                hub.hf_hub_download(repository, CONFIG, **options)
            except Exception:  # a cache of timm's holds the weights alone, whose name tells enough
                pass
            return found
    raise CheckpointError(
        f"{name}: {WEIGHTS} of {repository} is not in Hugging Face's cache and cannot be fetched "
        f"({reason}); fetch it where there is a network: hf download {repository}"
    )


def beside(file: Path) -> tuple[Path, dict[str, Any]]:
    """Return the JSON file beside weights and its content; the weights and {} where there is none.

    CheckpointError where it cannot be read.
    """
    names = [CONFIG, "encoder.json"]
    if file.name.startswith("encoder"):
        names.reverse()
    found = next((c for name in names if (c := file.parent / name).is_file()), None)
    if found is None:
        return file, {}
    try:
        if found.stat().st_size > 2**22:
            raise ValueError("it is too large for one")
        content = json.loads(found.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("Input should be an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{found} cannot be read: {error}") from error
    return found, content


def network(file: Path) -> dict[str, Any]:
    """Return how weights are computed with as far as no tensor shows it, {} where nothing says so.

    `architecture` and `model_args` of timm, and `rope_theta`. It is part of a stage's key.
    """
    content = beside(file)[1]
    told = {name: content.get(name) for name in ("architecture", "model_args", "rope_theta")}
    in_cache = _OF_TIMM.search(str(file))
    if told["architecture"] is None and in_cache:
        told["architecture"] = in_cache[1]
    if isinstance(told["architecture"], str):
        told["architecture"] = told["architecture"].partition(".")[0]
    found = {name: value for name, value in told.items() if value not in (None, {}, _OURS)}
    return found if "architecture" in found or "rope_theta" in found else {}
