"""Scores of generated answers (spec.md 5): exact match, option's letter, ANLS, relaxed accuracy, CIDEr without Java.

A score of one answer lies in 0..1; CIDEr of one caption lies in 0..10, as pycocoevalcap prints it. Uncertainty is
bootstrapped over *pictures*: all the questions of one picture form one cluster.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np

# ---------------------------------------------------------------------------------------------- short answers


def normalize_answer(text: str) -> str:
    """Lower case, white space folded, punctuation at the ends of words dropped ("3.5" and "blue-green" stay whole)."""
    words = (word.strip(string.punctuation) for word in unicodedata.normalize("NFKC", text).lower().split())
    return " ".join(word for word in words if word)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction is one of the normalised answers, else 0.

    An answer made of punctuation alone ("%") is compared as it stands, or every empty prediction would equal it.
    """
    normalized = normalize_answer(prediction)
    for answer in answers:
        wanted = normalize_answer(answer)
        if (wanted and normalized == wanted) or (not wanted and prediction.strip() == answer.strip()):
            return 1.0
    return 0.0


def levenshtein(first: str, second: str) -> int:
    """Number of insertions, deletions and substitutions between two strings."""
    if len(first) < len(second):
        first, second = second, first
    previous = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (letter != other)))
        previous = current
    return previous[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity (DocVQA): the best answer's 1 - distance / length, 0 below 0.5.

    Lower-cased, white space folded. A similarity of exactly the threshold counts, as in the official script.
    """
    prediction = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        answer = " ".join(answer.lower().split())
        length = max(len(prediction), len(answer))
        best = max(best, 1.0 - levenshtein(prediction, answer) / length if length else 1.0)
    return best if best >= threshold else 0.0


def _as_number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text.removesuffix("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA's measure: numbers within 5 % of the answer ("%" divides by 100), other text equal without case."""
    for answer in answers:
        wanted, given = _as_number(answer), _as_number(prediction)
        if wanted and given is not None:
            if abs(given - wanted) / abs(wanted) <= tolerance:
                return 1.0
        elif prediction.strip().lower() == answer.strip().lower():
            return 1.0
    return 0.0


def option_letter(prediction: str, options: Sequence[str] = ()) -> str:
    """The letter an answer names: "B", "(b)", "B. a cat", "The answer is B", or the text of one option; "" if none."""
    letters = string.ascii_uppercase[: len(options)] if options else string.ascii_uppercase
    text = prediction.strip()
    found = re.match(r"^\W*([A-Za-z])(?![\w'])", text)
    # A leading article ("a cat") is no letter: a lower-case one counts only when it stands alone or is marked off.
    alone = re.fullmatch(r"\W*\w\W*", text) or re.match(r"^\W*\w\s*[.):]", text)
    article = re.match(r"^[Aa]\s+[a-z]", text)
    if found and found[1].upper() in letters and (alone or found[1].isupper()) and not article:
        return found[1].upper()
    for letter, option in zip(letters, options, strict=False):
        if exact_match(text, [option]):
            return letter
    named = re.search(r"\b(?:answer|option|choice)\s*(?:is)?\s*:?\s*\(?([A-Za-z])\b", text, flags=re.IGNORECASE)
    return named[1].upper() if named and named[1].upper() in letters else ""


def option_accuracy(prediction: str, letter: str, options: Sequence[str] = ()) -> float:
    """1 if the answer names the right option's letter (or spells out that option), else 0."""
    return float(option_letter(prediction, options) == letter.strip().upper() != "")


# ---------------------------------------------------------------------------------------------- captions

# What pycocoevalcap drops after the tokenizer; brackets stay, because lower-casing turns -LRB- into -lrb-.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# The full stop belongs to these (and to single letters and letters with stops between them); all others give it up.
_ABBREVIATIONS = (
    "mr mrs ms dr prof sr jr st ave blvd rd bros inc ltd corp co etc vs no ft sq lt sgt col gen gov rep sen capt cmdr "
    "maj lieut hon rev jan feb mar apr jun jul aug sep sept oct nov dec mt al ed esq ph fig figs pp eq eqs"
).split()
_SPLIT_WORDS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me",
    "lemme": "lem me", "'tis": "'t is", "'twas": "'t was", "gunna": "gun na",
}  # fmt: skip
_TOKEN = re.compile(
    r"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                       # addresses
  | </?[a-z][^<>]*>                                                     # markup stays whole
  | '(?:tis|twas)\b | 'n'
  | (?P<clitic>'(?:s|m|d|re|ve|ll)\b | n't\b)
  | \d+(?:[.,:/]\d+)+(?:-?[a-z]+)* | (?<![\w.])\.\d+ | (?<![\w])[-+]\d+(?:[.,]\d+)*
  | (?:[^\W\d_]\.)+(?:[^\W\d_](?=\.))?\.?(?<=\.)(?!\w)                 # u.s., e.g., a.m.
  | (?:ABBREVIATIONS)\.(?!\w)
  | (?:at&t|r&b|r&d|q&a|p&l|m&m|s&p)\b
  | [@\#](?=\w)\w+ (?<!\#\d)
  | (?:o|d|l)'[^\W\d_]{2,}
  | [^\W_](?:[\w]|[-/.](?=[^\W_]))*?(?=n't\b)
  | \w+(?:[-/.](?=\w)\w+)*
  | \.{2,} | -{2,} | [?!]+ | .
    """.replace("ABBREVIATIONS", "|".join(_ABBREVIATIONS)),
    re.VERBOSE | re.DOTALL,
)


def tokenize_caption(caption: str) -> str:
    """A caption as CIDEr compares it: Stanford's PTB tokens in lower case without punctuation, joined by one space.

    Pure Python in place of the Java program that pycocoevalcap starts; equal on ordinary captions.
    """
    text = caption.replace("\n", " ").lower()
    for typographic, plain in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("–", "--"), ("—", "--"), ("…", "...")):
        text = text.replace(typographic, plain)
    tokens: list[str] = []
    for found in _TOKEN.finditer(text):
        token = _SPLIT_WORDS.get(found[0], found[0])
        if token.isspace() or token in _DROPPED or set(token) in ({'"'}, {"."}, {"-"}):
            continue
        if token > "\uffff":  # beyond the basic plane (emoji): the Java program knows no such characters
            continue
        tokens.append(_BRACKETS.get(token, token))
    return " ".join(tokens)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr of each caption, 0..10 (their mean is the corpus score); word weights come from these references.

    As in pycocoevalcap the weights are counted over the given set, so scores of subsets differ and a set of one
    caption scores 0.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} captions but {len(references)} sets of references")
    if not predictions:
        return np.zeros(0)
    scorer = CiderScorer(n=4, sigma=6.0)
    for prediction, captions in zip(predictions, references, strict=True):
        scorer += (tokenize_caption(prediction), [tokenize_caption(caption) for caption in captions])
    _, scores = scorer.compute_score()
    return np.asarray(scores, dtype=float)


# ---------------------------------------------------------------------------------------------- by name

# Every metric of one answer: (prediction, benchmark row) -> 0..1. CIDEr needs the whole set and stands apart.
SINGLE_METRICS: dict[str, Callable[[str, Mapping], float]] = {
    "exact_match": lambda prediction, row: exact_match(prediction, row["answers"]),
    "anls": lambda prediction, row: anls(prediction, row["answers"]),
    "relaxed_accuracy": lambda prediction, row: relaxed_accuracy(prediction, row["answers"]),
    "option_letter": lambda prediction, row: option_accuracy(prediction, row["answer_letter"], row["options"]),
}
METRIC_NAMES = (*SINGLE_METRICS, "cider")


def score_answers(metric: str, predictions: Sequence[str], rows: Sequence[Mapping]) -> np.ndarray:
    """Score of each answer under the named metric; rows hold `answers`, `options` and `answer_letter`."""
    if metric == "cider":
        return cider(predictions, [row["answers"] for row in rows])
    score = SINGLE_METRICS[metric]
    return np.array([score(text, row) for text, row in zip(predictions, rows, strict=True)], dtype=float)


# ---------------------------------------------------------------------------------------------- uncertainty

_CHUNK_ELEMENTS = 4_000_000  # drawn cluster counts held at once: 32 MB


def _cluster_draws(num_clusters: int, num: int, generator: np.random.Generator) -> Iterable[np.ndarray]:
    """How often each cluster is drawn, in chunks of shape (draws, num_clusters)."""
    chunk = max(1, _CHUNK_ELEMENTS // num_clusters)
    shares = np.full(num_clusters, 1.0 / num_clusters)
    for start in range(0, num, chunk):
        yield generator.multinomial(num_clusters, shares, size=min(chunk, num - start)).astype(float)


def bootstrap_interval(
    scores: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, num: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean score, whole clusters (pictures) drawn with replacement.

    Same unit as `scores`. For CIDEr the word weights of the full set are kept. NaN, NaN without scores.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.size == 0:
        return float("nan"), float("nan")
    _, cluster_of = np.unique(np.array([str(cluster) for cluster in clusters]), return_inverse=True)
    sums, counts = np.bincount(cluster_of, weights=scores), np.bincount(cluster_of)
    generator = np.random.default_rng(seed)
    means = np.concatenate([drawn @ sums / (drawn @ counts) for drawn in _cluster_draws(len(sums), num, generator)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    clusters: Sequence[Sequence[Hashable]],
    seed: int = 0,
    num: int = 2000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of `first - second` and its bootstrap interval over training seeds x pictures (protocols.md).

    One entry per training seed; inside an entry the i-th scores of both arms answer the same question, and
    `clusters` names its picture. A picture that several seeds share is drawn for all of them together.
    Returns (difference, low, high); a ranking is worth printing only where the interval excludes 0.
    """
    if not len(first) == len(second) == len(clusters):
        raise ValueError(f"arms of {len(first)} and {len(second)} seeds, clusters of {len(clusters)}: not paired")
    names, cluster_of = np.unique(np.array([str(name) for row in clusters for name in row]), return_inverse=True)
    seed_of = np.repeat(np.arange(len(first)), [len(row) for row in clusters])
    differences = np.concatenate(
        [np.asarray(a, dtype=float) - np.asarray(b, dtype=float) for a, b in zip(first, second, strict=True)]
    )
    if len(differences) == 0 or len(differences) != len(cluster_of):
        raise ValueError(f"{len(differences)} paired scores but {len(cluster_of)} cluster names")
    sums, counts = np.zeros((2, len(names), len(first)))
    np.add.at(sums, (cluster_of, seed_of), differences)
    np.add.at(counts, (cluster_of, seed_of), 1.0)
    generator = np.random.default_rng(seed)
    means = []
    for drawn in _cluster_draws(len(names), num, generator):
        seeds_drawn = generator.multinomial(len(first), np.full(len(first), 1 / len(first)), size=len(drawn))
        totals, numbers = ((drawn @ values * seeds_drawn).sum(axis=1) for values in (sums, counts))
        means.append(totals[numbers > 0] / numbers[numbers > 0])
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


def most_frequent(answers: Iterable[str]) -> str | None:
    """The answer given most often (compared as exact match does; the earlier one of equals), None without answers."""
    spellings: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for answer in answers:
        key = normalize_answer(answer)
        spellings.setdefault(key, answer)
        counts[key] += 1
    return spellings[counts.most_common(1)[0][0]] if counts else None
