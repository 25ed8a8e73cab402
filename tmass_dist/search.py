"""Search a gallery by text: ``python -m tmass_dist.search GALLERY "a dog jumps into a lake"``.

The candidates are the videos with the best single frame. The best 400 of them by an approximate score get the model's
exact score; in a gallery without more videos than candidates, every video gets it. The moment is the time of the frame
that the attention weighs most.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tmass_dist.cli import printable, program, run_command
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from tmass_dist.retrieval.searcher import Result


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.search"), description=__doc__)
    parser.add_argument("gallery", type=Path, help="a gallery of tmass index, or a run directory (its test split)")
    parser.add_argument("query", nargs="*", help="one or several texts")
    parser.add_argument("--file", type=Path, metavar="QUERIES.txt", help="further queries, a line each")
    parser.add_argument("-k", type=int, default=10, help="results of a query (10)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=2000,
        help="most videos, those with the best frames, that are considered (2000)",
    )
    parser.add_argument("--name", help="only videos whose id contains this")
    parser.add_argument("--model", help="the model, if it is not where it was when the gallery was made")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each query")
    arguments = parser.parse_args()
    queries = list(arguments.query)
    if arguments.file:
        try:
            lines = arguments.file.read_text(encoding="utf-8-sig").split("\n")  # str.splitlines also splits at U+2028
        except UnicodeDecodeError as error:
            raise UserError(f"{arguments.file} is not a UTF-8 text file: {error}") from error
        queries += [line for line in lines if line.strip()]
    if not queries:
        raise UserError('there is no query; write one, as tmass search GALLERY "a dog in a lake", or use --file')
    from tmass_dist.retrieval.searcher import check_query, open_searcher
    from tmass_dist.score_labels import label_words

    queries = [check_query(query) for query in queries]
    searcher = open_searcher(arguments.gallery, arguments.model, arguments.candidates)
    labels = searcher.labels(arguments.k, arguments.name)
    for start in range(0, len(queries), 64):
        some = queries[start : start + 64]
        for query, results in zip(some, searcher.search(some, arguments.k, name=arguments.name)):
            if arguments.json:
                line = {"query": query, "results": [result.as_json() for result in results]}
                line |= {"absent": sum(result.absent for result in results), "labels": labels}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                _show(query, results, len(searcher.gallery))
    if not arguments.json:
        print(f"scores: {', '.join(label_words(labels))}")


def _show(query: str, results: list[Result], size: int) -> None:
    absent = sum(result.absent for result in results)
    note = f", {absent} of the results have no file any more" if absent else ""
    print(f"{printable(query)}  ({size} videos{note})")
    names = [printable(result.id) for result in results]
    width = max(map(len, names), default=0)
    for place, (name, result) in enumerate(zip(names, results), start=1):
        path = printable(result.path) + ("  (no file)" if result.absent else "")
        print(f"  {place:>3}  {result.score:.4f}  {name:<{width}}  {result.time_s:7.1f} s  {path}")


if __name__ == "__main__":
    run_command(main)
