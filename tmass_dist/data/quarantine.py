"""The list of damaged videos of a run. Too many of them end the run."""

from __future__ import annotations

import json
from pathlib import Path

from tmass_dist import distributed
from tmass_dist.cli import write_text
from tmass_dist.data.json_lines import read_json_lines
from tmass_dist.errors import UserError


class Quarantine:
    """``quarantine.jsonl`` of a run; every rank holds the same list.

    Args:
        path: the file; entries from an earlier start count.
        num_videos: videos of the training split.
        max_bad: largest share of damaged videos that is tolerated.
    """

    def __init__(self, path: Path, num_videos: int, max_bad: float) -> None:
        self.path, self.limit = path, max_bad * num_videos
        entries = [entry for _, entry in read_json_lines(path)] if path.is_file() else []
        self.reasons: dict[str, str] = {}
        for entry in entries:
            if not isinstance(entry.get("id"), str):
                raise UserError(f"{path} has a line without an id; delete the line or the file")
            self.reasons[entry["id"]] = str(entry.get("reason"))

    def unknown(self, damaged: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The pairs (id, reason) that are not in the list yet."""
        return [(video, reason) for video, reason in damaged if video not in self.reasons]

    def add(self, damaged: list[tuple[str, str]]) -> list[str]:
        """Add the damaged videos of all ranks; a collective. Returns one line for the log for each new video.

        Args:
            damaged: (id, reason) of this rank.

        Raises:
            UserError: more videos are damaged than ``max_bad`` allows; it names them.
        """
        new = dict(pair for part in distributed.all_gather_objects(self.unknown(damaged)) for pair in part)
        self.reasons |= new
        if distributed.is_main():
            lines = [json.dumps({"id": video, "reason": reason}) + "\n" for video, reason in self.reasons.items()]
            write_text(self.path, "".join(lines))
        if len(self.reasons) > self.limit:
            names = "; ".join(list(self.reasons.values())[:5])
            raise UserError(
                f"{len(self.reasons)} damaged videos are more than data.max_bad allows: {names}. See {self.path}; "
                "pack their shards again, or raise data.max_bad"
            )
        return [f"{reason}; another video replaces it" for reason in new.values()]
