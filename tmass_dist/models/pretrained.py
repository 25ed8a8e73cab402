"""Pretrained towers that open_clip knows by a tag: whether this machine has them, and how to fetch them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from tmass_dist.cli import replacing
from tmass_dist.config import CONFIG_DIR, ModelConfig
from tmass_dist.errors import MachineError, UserError
from tmass_dist.models import library
from tmass_dist.models.loading import is_whole_model, weight_names, whole_model_error
from tmass_dist.network import answers


def is_file(pretrained: str) -> bool:
    """Whether ``model.pretrained`` names a file, and not a tag."""
    return pretrained.endswith((".safetensors", ".pt"))


def find_file(path: str) -> Path:
    """The file of this path, else the one of this name in ``configs/``."""
    for candidate in (Path(path), CONFIG_DIR / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"no file {path}, neither here nor in configs/")


def _letters(name: str) -> str:
    """A name without case and separators: ``vit_b_32`` is ``ViT-B-32``."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def check_architecture(architecture: str) -> None:
    """Raise a UserError that lists similar names if open_clip knows no such architecture."""
    known = list(library.catalog().architectures)
    if architecture not in known:
        by_letters = {_letters(name): name for name in known}
        near = [by_letters[name] for name in difflib.get_close_matches(_letters(architecture), by_letters, 3, 0.3)]
        near = near or known[:3]
        raise UserError(f"open_clip knows no architecture {architecture!r}; the nearest are {', '.join(near)}")


def check_tag(architecture: str, tag: str) -> None:
    """Raise a UserError that lists the tags of ``architecture`` if ``tag`` is none of them."""
    known = library.catalog().weights.get(architecture, {})
    if tag not in known:
        raise UserError(f"open_clip has no weights {tag!r} of {architecture}; it has {', '.join(known) or 'none'}")


def file_name(architecture: str, tag: str) -> str:
    """Name of the file that :func:`fetch` writes; :func:`pretrained_cfg` finds the tag in it."""
    return f"{architecture.replace('/', '-')}.{tag}.safetensors"


def pretrained_cfg(architecture: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip knows of the weights that ``model.pretrained`` names, such as the normalisation of pixels.

    A file that ``tmass weights fetch`` wrote has its tag in its name. For other files, and for None, it is the first
    tag of the architecture; empty if there is none.
    """
    known = library.catalog().weights.get(architecture, {})
    name = Path(pretrained).name if pretrained else None
    named = (cfg for tag, cfg in known.items() if pretrained == tag or name == file_name(architecture, tag))
    return next(named, next(iter(known.values()), {}))


def locate(architecture: str, tag: str) -> Path:
    """The file of the weights ``tag``: the one in the cache, else it is downloaded to the cache.

    Raises:
        UserError: it is not in the cache and no server can be reached; the message says how to bring it here.
        MachineError: the download failed.
    """
    cached = cached_weights(architecture, tag)
    if cached is not None:
        return cached
    refuse_unreachable(
        f"the weights {tag} of {architecture} are",
        f"`tmass weights fetch {architecture} {tag} --out weights`, copy weights/{file_name(architecture, tag)} to "
        "this machine, and set model.pretrained to its path here",
    )
    return _download(architecture, tag)


def why_unreachable() -> str | None:
    """Why nothing can be downloaded: the Hugging Face Hub does not answer within 1.5 s, or must not be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return None if answers(constants.ENDPOINT) else f"{constants.ENDPOINT} cannot be reached"


def refuse_unreachable(what: str, remedy: str) -> None:
    """Raise a UserError if nothing can be downloaded."""
    reason = why_unreachable()
    if reason is not None:
        raise UserError(
            f"{what} not in the cache of this machine, and {reason}: on a machine with internet run {remedy}"
        )


def _hub_files(architecture: str, tag: str) -> tuple[str, list[str]]:
    """Repository of the weights on the Hub ("": not there), and names the file may have, in order of preference."""
    known = library.catalog().weights.get(architecture, {}).get(tag, {})  # a JSON file of towers has no tags
    repository, _, name = known.get("hf_hub", "").rpartition("/")
    if not name:
        return repository, ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    return repository, list(dict.fromkeys([Path(name).with_suffix(".safetensors").name, name]))


def cached_weights(architecture: str, tag: str) -> Path | None:
    """The file of the weights in the cache of the Hugging Face Hub (``HF_HOME``); None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    repository, names = _hub_files(architecture, tag)
    paths = [try_to_load_from_cache(repository, name) for name in names] if repository else []
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _download(architecture: str, tag: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, names = _hub_files(architecture, tag)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the Hub did not answer
                raise _failed_download(architecture, tag, error) from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"the Hub gives no access to {repository}, which holds the weights {tag} of {architecture}: log in "
                "with `hf auth login`, or set model.pretrained to a local file"
            ) from error
        except Exception as error:
            raise _failed_download(architecture, tag, error) from error
    raise UserError(f"{repository} has no file {' or '.join(names)}; set model.pretrained to a local file")


def _failed_download(architecture: str, tag: str, error: Exception) -> MachineError:
    line = " ".join(str(error).split())[:200]
    return MachineError(f"the weights {tag} of {architecture} cannot be downloaded: {line}")


def tokenizer_repository(architecture: str) -> str | None:
    """Repository of the tokenizer on the Hub; None if it comes with open_clip."""
    return library.catalog().architectures[architecture]["text_cfg"].get("hf_tokenizer_name")


def _check_tokenizer(architecture: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    repository = tokenizer_repository(architecture)
    if repository is None or isinstance(try_to_load_from_cache(repository, "tokenizer_config.json"), str):
        return
    refuse_unreachable(
        f"the tokenizer {repository} of {architecture} is",
        f"`tmass weights fetch {architecture} TAG`, and copy the directory that it names to this machine",
    )


def check_pretrained(model: ModelConfig, *, with_weights: bool = True) -> None:
    """Check that the towers of ``model`` can be built on this machine; a tag that is not cached yet is downloaded.

    Args:
        model: the settings.
        with_weights: False if the weights come from elsewhere: only the architecture and the tag are checked.

    Raises:
        UserError: an unknown architecture or tag, a missing file, or weights that cannot be had without internet.
    """
    if model.architecture.endswith(".json"):
        find_file(model.architecture)
        if model.pretrained is not None and not is_file(model.pretrained):
            raise UserError(
                f"model.pretrained={model.pretrained} is a tag of open_clip, and model.architecture="
                f"{model.architecture} is a description of your own; set model.pretrained to a weights file, or null"
            )
    else:
        check_architecture(model.architecture)
        _check_tokenizer(model.architecture)
    if model.pretrained is None:
        return
    if not is_file(model.pretrained):
        check_tag(model.architecture, model.pretrained)
        if with_weights:
            locate(model.architecture, model.pretrained)
    elif with_weights:
        try:
            path = find_file(model.pretrained)
            names = weight_names(path) if path.suffix == ".safetensors" else []
        except UserError as error:
            raise UserError(f"model.pretrained={model.pretrained}: {error}") from error
        if is_whole_model(names):
            raise whole_model_error(str(path))


def fetch_tokenizer(architecture: str) -> Path | None:
    """Download the tokenizer to the cache; returns its directory there, or None if it comes with open_clip."""
    from huggingface_hub import snapshot_download

    repository = tokenizer_repository(architecture)
    if repository is None:
        return None
    files = ["*.json", "*.model", "*.txt"]
    return Path(snapshot_download(repository, allow_patterns=files)).parents[1]


def fetch(architecture: str, tag: str, directory: Path) -> Path:
    """Download weights and write them to ``directory`` as open_clip's names in one safetensors file.

    Returns:
        The file, for ``model.pretrained``.
    """
    from safetensors.torch import save_file

    check_architecture(architecture)
    check_tag(architecture, tag)
    clip = library.open_clip().create_model(architecture, pretrained=str(locate(architecture, tag)))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / file_name(architecture, tag)
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, temporary)
    return path
