"""Scores of generated answers (Table C2): exact match, VQA accuracy, option's letter, ANLS, relaxed accuracy, MME, CIDEr without Java.

A score of one answer lies in 0..1; CIDEr of one caption lies in 0..10, as pycocoevalcap prints it. `benchmark_score` makes the
number that is reported. Uncertainty is that of *pictures*: all the questions of one picture form one cluster.
"""

from __future__ import annotations

import contextlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

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


def gqa_exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer equals one of the given ones without case and without any punctuation (lmms-eval's rule for GQA)."""
    return float(_unpunctuated(prediction) in map(_unpunctuated, answers))


def _unpunctuated(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# The VQA evaluation's English: a word that lacks one apostrophe gets it back, small numbers become digits, articles go.
_APOSTROPHES = (
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've "
    "o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've "
    "y'all'll you'd you'd've you'll you're you've"
).split()
_VQA_WORDS = {word[:i] + word[i + 1 :]: word for word in _APOSTROPHES for i, letter in enumerate(word) if letter == "'"}
_VQA_WORDS["somebody'd"] = "somebodyd"  # a slip of the official table, kept because scores are compared
_VQA_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_VQA_NUMBERS["none"] = "0"
_VQA_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
_VQA_FULL_STOP = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")


def normalize_vqa(text: str, challenge: bool = False) -> str:
    """An answer as the official VQA evaluation compares it (VQAv2). `challenge`: as the EvalAI servers of TextVQA, OK-VQA and
    VizWiz do, which also drop commas and question marks at first and part off a possessive 's."""
    if challenge:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    whole = text
    for mark in _VQA_PUNCTUATION:  # between letters a mark parts words, beside a space (or with 1,000 in the text) it vanishes
        vanishes = f"{mark} " in whole or f" {mark}" in whole or _COMMA_IN_NUMBER.search(whole)
        text = text.replace(mark, "" if vanishes else " ")
    words = _VQA_FULL_STOP.sub("", text, count=32).lower().split()  # 32: the official call passes a flag as the count
    words = [_VQA_NUMBERS.get(word, word) for word in words]
    return " ".join(_VQA_WORDS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: Sequence[str], challenge: bool = False) -> float:
    """Soft accuracy: the mean, over each annotator left out, of min(1, equal answers among the others / 3)."""
    wanted, given = [normalize_vqa(answer, challenge) for answer in answers], normalize_vqa(prediction, challenge)
    equal = sum(answer == given for answer in wanted)
    return sum(min(1.0, (equal - (answer == given)) / 3) for answer in wanted) / len(wanted) if wanted else 0.0


def yes_no(prediction: str) -> str:
    """What MME's evaluation reads: "yes", "no" or "other", from the first four letters ("y" and "n" stand for the words)."""
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


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
    given = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        length = max(len(prediction), len(answer))  # as written, as in the official script
        best = max(best, 1.0 - levenshtein(given, " ".join(answer.lower().split())) / length if length else 1.0)
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
    text = prediction.strip()
    named = re.finditer(r"\b(?:answer|option|choice)\s*(?:is)?\s*:?\s*(?=(.+))", text, flags=re.IGNORECASE | re.DOTALL)
    return _leading_option(text, options) or next((letter for found in named if (letter := _leading_option(found[1], options, named=True))), "")


def _leading_option(text: str, options: Sequence[str], named: bool = False) -> str:
    """The option that a text begins with or is. `named`: the text follows "the answer is"."""
    letters = string.ascii_uppercase[: len(options)] if options else string.ascii_uppercase
    found = re.match(r"^\W*([A-Za-z])(?![\w'])", text)
    # A leading article ("a cat") is no letter: a lower-case one counts only when it stands alone or is marked off.
    alone = re.fullmatch(r"\W*\w\W*", text) or re.match(r"^\W*\w\s*[.):]", text)
    article = re.match(r"^[Aa]\s+[a-z]", text)
    known = found is not None and found[1].upper() in letters
    if known and alone:
        return found[1].upper()
    for letter, option in zip(letters, options, strict=False):
        if exact_match(text, [option]) or named and exact_match(text.rstrip(" ."), [option]):
            return letter
    if known and not article and (found[1].isupper() or named and found[1] != "a"):
        return found[1].upper()
    return ""


def option_accuracy(prediction: str, letter: str, options: Sequence[str] = ()) -> float:
    """1 if the answer names the right option's letter (or spells out that option), else 0."""
    return float(option_letter(prediction, options) == letter.strip().upper() != "")


def first_letter(prediction: str, letter: str) -> float:
    """1 if the answer begins with the right option's letter: how lmms-eval reads SEED-Bench."""
    return float(prediction.strip()[:1].upper() == letter.strip().upper() != "")


def letter_alone(prediction: str, letter: str) -> float:
    """1 if the answer is the right option's letter, or begins with it as "A.": how LLaVA and lmms-eval read ScienceQA."""
    text, letter = prediction.strip(), letter.strip().upper()
    return float(letter != "" and (text.upper() == letter or text[:2] == f"{letter}."))


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
    "vqa_accuracy": lambda prediction, row: vqa_accuracy(prediction, row["answers"]),
    "vqa_accuracy_challenge": lambda prediction, row: vqa_accuracy(prediction, row["answers"], challenge=True),
    "gqa_exact": lambda prediction, row: gqa_exact(prediction, row["answers"]),
    "anls": lambda prediction, row: anls(prediction, row["answers"]),
    "relaxed_accuracy": lambda prediction, row: relaxed_accuracy(prediction, row["answers"]),
    "option_letter": lambda prediction, row: option_accuracy(prediction, row["answer_letter"], row.get("options", ())),
    "first_letter": lambda prediction, row: first_letter(prediction, row["answer_letter"]),
    "letter_alone": lambda prediction, row: letter_alone(prediction, row["answer_letter"]),
    "mme": lambda prediction, row: float(yes_no(prediction) == yes_no(row["answers"][0])),
}
METRIC_NAMES = (*SINGLE_METRICS, "cider")
LETTER_METRICS = ("option_letter", "first_letter", "letter_alone")
SUBMISSION = "submission"  # in place of a metric: the answers are withheld, a file for the organisers' server is written


def score_answers(metric: str, predictions: Sequence[str], rows: Sequence[Mapping]) -> np.ndarray:
    """Score of each answer under the named metric, NaN where the answers are withheld; rows hold `answers`, `options`,
    `answer_letter`."""
    if metric == SUBMISSION:
        return np.full(len(predictions), np.nan)
    if metric == "cider":
        return cider(predictions, [row["answers"] for row in rows])
    score = SINGLE_METRICS[metric]
    return np.array([score(text, row) for text, row in zip(predictions, rows, strict=True)], dtype=float)


def benchmark_score(metric: str, scores: Sequence[float], rows: Sequence[Mapping]) -> float:
    """The reported number: 100 x the mean; of MME the sum over subtasks (`attribute`) of (accuracy + accuracy+) x 100.

    MME's accuracy+ counts pictures whose questions are all right. Raises ValueError without scores.
    """
    if len(scores) == 0:
        raise ValueError("no scores to sum up")
    if metric != "mme":
        return 100.0 * float(np.mean(scores))
    (total,) = _mme_totals(scores, rows, None)
    return float(total)


def _mme_totals(scores: Sequence[float], rows: Sequence[Mapping], drawn_DC: np.ndarray | None) -> np.ndarray:
    """MME's sum; with `drawn_DC` for each of D draws of the pictures (in the order of their sorted keys). Accuracy+ takes a pair: a picture
    with one question left (a limit, an error) has none."""
    keys = [f"{row['attribute']}\0{row['picture_id']}" for row in rows]
    names, picture_of = np.unique(keys, return_inverse=True)
    counts = np.bincount(picture_of)
    accuracy = np.bincount(picture_of, weights=np.asarray(scores, dtype=float)) / counts
    values = accuracy + ((accuracy == 1.0) & (counts > 1))
    if drawn_DC is None:
        drawn_DC = np.ones((1, len(names)))
    subtask_of = np.array([name.partition("\0")[0] for name in names])
    totals = np.zeros(len(drawn_DC))
    for subtask in np.unique(subtask_of):  # pictures weigh equally: each subtask asks as many questions about each
        own = drawn_DC[:, subtask_of == subtask]
        drawn = own.sum(axis=1)
        totals += 100.0 * (own @ values[subtask_of == subtask]) / np.maximum(drawn, 1)
    return totals


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


def wilson_interval(num_correct: int, num_samples: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num_samples).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def all_or_none_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float] | None:
    """Wilson's interval over pictures where every score is 1 or every one 0, None elsewhere.

    Neither a bootstrap nor a standard error has any width there, however few the pictures."""
    if len(set(scores)) != 1 or scores[0] not in (0.0, 1.0):
        return None
    num = len(set(clusters))
    return wilson_interval(num * int(scores[0]), num)


def share_interval(scores: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, num: int = 2000) -> tuple[float, float]:
    """`bootstrap_interval` of scores in 0..1, `all_or_none_interval` where it would have no width."""
    return all_or_none_interval(scores, clusters) or bootstrap_interval(scores, clusters, seed, num)


def score_interval(
    metric: str, scores: Sequence[float], rows: Sequence[Mapping], seed: int = 0, num: int = 2000
) -> tuple[float, float]:
    """95 % interval of `benchmark_score`, in its unit, with pictures (`picture_id`) as clusters.

    Means: lmms-eval's clustered standard error and the normal quantile, cut at 0 and 100; Wilson's interval where all are right
    or all wrong. CIDEr and MME: bootstrap over pictures.
    """
    clusters = [str(row["picture_id"]) for row in rows]
    if metric == "cider":
        low, high = bootstrap_interval(scores, clusters, seed, num)
        return 100.0 * low, 100.0 * high
    if metric == "mme":
        low, high = np.quantile(_mme_totals(scores, rows, _mme_draws(rows, num, seed)), [0.025, 0.975])
        return float(low), float(high)
    if found := all_or_none_interval(scores, clusters):
        return 100.0 * found[0], 100.0 * found[1]
    mean, error = float(np.mean(scores)), clustered_error(scores, clusters)
    low, high = (mean, mean) if np.isnan(error) else (mean - 1.96 * error, mean + 1.96 * error)
    return 100.0 * max(0.0, low), 100.0 * min(1.0, high)


def paired_scores(
    metric: str, first: Sequence[float], second: Sequence[float], rows: Sequence[Mapping], seed: int = 0, num: int = 2000
) -> tuple[float, float, float, float | None]:
    """(difference, low, high, p) of two models in the unit of `benchmark_score`, on the same questions `rows`.

    Means: `paired_test`. CIDEr and MME: bootstrap over pictures, the same draws for both models; p is None.
    """
    if metric == "cider":
        difference, low, high = paired_difference([first], [second], [[row["picture_id"] for row in rows]], seed, num)
        return 100.0 * difference, 100.0 * low, 100.0 * high, None
    if metric == "mme":
        drawn = _mme_draws(rows, num, seed)
        low, high = np.quantile(_mme_totals(first, rows, drawn) - _mme_totals(second, rows, drawn), [0.025, 0.975])
        return benchmark_score(metric, first, rows) - benchmark_score(metric, second, rows), float(low), float(high), None
    difference, low, high, p = paired_test(first, second, [str(row["picture_id"]) for row in rows])
    return 100.0 * difference, 100.0 * low, 100.0 * high, p


def _mme_draws(rows: Sequence[Mapping], num: int, seed: int) -> np.ndarray:
    """How often each picture is drawn, (num, pictures): of each subtask as many as the benchmark has."""
    names = np.unique([f"{row['attribute']}\0{row['picture_id']}" for row in rows])
    subtask_of = np.array([name.partition("\0")[0] for name in names])
    generator = np.random.default_rng(seed)
    drawn_DC = np.zeros((num, len(names)))
    for subtask in np.unique(subtask_of):
        columns = np.flatnonzero(subtask_of == subtask)
        drawn_DC[:, columns] = generator.multinomial(len(columns), np.full(len(columns), 1 / len(columns)), size=num)
    return drawn_DC


def clustered_error(scores: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean when the scores of one cluster are dependent (lmms-eval's); NaN below two scores."""
    with strict_pillow():
        from lmms_eval.api.metrics import clustered_stderr
    return float(clustered_stderr([float(score) for score in scores], list(clusters)))


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """Importing lmms-eval makes Pillow accept truncated pictures; around that import the setting stays what it was."""
    from PIL import ImageFile

    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def paired_test(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float, float, float, float]:
    """(difference of means, low, high, p) of two models' scores on the same questions, pictures as clusters.

    lmms-eval's paired t-test with its clustered standard error of the differences; equal to it where every picture has one
    question. Degrees of freedom: pictures - 1. ValueError for lists of different lengths or fewer than two pictures.
    """
    from scipy import stats

    if not len(first) == len(second) == len(clusters):
        raise ValueError(f"{len(first)}, {len(second)} scores and {len(clusters)} pictures are not paired")
    num = len(set(clusters))
    if num < 2:
        raise ValueError(f"{num} pictures: a paired test needs at least two")
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, error = float(differences.mean()), clustered_error(differences, clusters)
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    reach = float(stats.t.ppf(0.975, num - 1)) * error
    return mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean / error), num - 1))


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
