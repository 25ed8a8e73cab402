"""Models on the Hugging Face Hub: how they are uploaded and downloaded, and their errors in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from tmass_dist.errors import UserError
from tmass_dist.models.warm_start import EXPORTED_WEIGHTS

HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
"""Options of a download."""


def download(name: str, options: dict[str, Any]) -> Path:
    """The directory, in the library's cache, with settings and weights of a model; see :func:`in_one_line`.

    Args:
        name: ``organisation/name``.
        options: those of ``HUB_OPTIONS`` are used.
    """
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    config = Path(hf_hub_download(name, "config.json", **hub))
    hf_hub_download(name, EXPORTED_WEIGHTS, **hub)  # into the same directory
    return config.parent


@contextlib.contextmanager
def in_one_line(name: str) -> Iterator[None]:
    """Raise a UserError for what goes wrong while a model is loaded by its name."""
    try:
        yield
    except (HFValidationError, HfHubHTTPError, OSError) as error:  # OSError: also what is not in the library's cache
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"there is no model {name}: no such directory, and the Hub does not give it ({reason[0]})"
        ) from error
    except TypeError as error:
        raise UserError(f"{name}/config.json is not the config of a model of this kind: {error}") from error


class HubModel(PyTorchModelHubMixin):
    """The library's class, with cards that name where the model is."""

    def save_pretrained(
        self, save_directory: str | Path, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> str | None:
        """Write an export: weights, settings and card.

        Args:
            save_directory: made if it does not exist.
            model_card_kwargs: of :meth:`generate_model_card`; by default the card names the directory.
            options: of ``huggingface_hub``.
        """
        directory = Path(save_directory)
        (directory / "README.md").unlink(missing_ok=True)  # the library would keep it, whatever model it describes
        card = {"name": directory.name} | (model_card_kwargs or {})
        return super().save_pretrained(directory, model_card_kwargs=card, **options)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        """Upload the model to the Hugging Face Hub; ``from_pretrained(repo_id)`` then loads it anywhere.

        Args:
            repo_id: ``organisation/name``, or a name of your own; made if it does not exist.
            private: whether a new repository is private.
            token: that may write there; by default the one of ``hf auth login``.
            options: of ``huggingface_hub``: ``commit_message``, ``branch``, ``create_pr``, ...

        Returns:
            Address of the commit.
        """
        name = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = options.pop("model_card_kwargs", None) or {}
        return super().push_to_hub(
            name, private=private, token=token, model_card_kwargs=card | {"name": name}, **options
        )
