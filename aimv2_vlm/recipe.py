"""Recipes: YAML -> the dataclasses of `config.py`, with `base:`, `key=value` overrides and errors that name the nearest key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from aimv2_vlm import config
from aimv2_vlm.config import UserError

MAX_NODES = 100_000  # values in one YAML file, aliases written out
FOLDERS = {"pretrain": config.PretrainRecipe, "sft": config.SftRecipe, "eval": config.EvalConfig, "scaling": config.ScalingConfig}
PLACES = {"pretrain": "pretrain", "sft": "sft_recipes", "eval": "eval_configs", "scaling": "pretrain/scaling"}


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1: `1e-4` is text and `on` is a boolean. This one has YAML 1.2's rules and refuses doubled keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise UserError(f"{self.name}: line {key_node.start_mark.line + 1}: key '{key}' stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_yaml(path: Path) -> dict[str, Any]:
    """One YAML file as a mapping; UserError with file and line when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return parse_yaml(text, str(path)) or {}


def parse_yaml(text: str, name: str) -> Any:
    """YAML text as plain values; UserError naming `name` and the line when it is not valid or unfolds without end."""
    loader = None
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded_size(node, {}) > MAX_NODES:
            raise UserError(f"{name}: its aliases unfold to more than {MAX_NODES:,} values; write the values out")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{name}: {where}not valid YAML ({getattr(error, 'problem', None) or str(error).splitlines()[0]})") from None
    except (RecursionError, ValueError, TypeError, OverflowError, AttributeError) as error:
        # PyYAML lets these through: nesting too deep, impossible dates and numbers, a list as a key, text under a foreign tag.
        raise UserError(f"{name}: not valid YAML ({type(error).__name__}: {str(error)[:100]})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _unfolded_size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values that a node stands for when its aliases are written out; infinite when one leads back to itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        children = node.value if isinstance(node.value, list) else []
        known[id(node)] = 1 + sum(_unfolded_size(part, known) for child in children for part in (child if isinstance(child, tuple) else (child,)))
    return known[id(node)]


def recipes_dir(verb: str) -> Path:
    """Folder of the recipes that ship with the package (a checkout's, or the wheel's)."""
    inside = Path(__file__).parent / "recipes" / PLACES[verb]
    return inside if inside.is_dir() else Path(__file__).parent.parent / PLACES[verb]


def find_recipe(verb: str, name: str) -> Path:
    """`name` as a file, or as a recipe that ships with the package (with or without `.yaml`)."""
    given = Path(name)
    if given.is_file():
        return given
    shipped = {path.stem: path for path in sorted(recipes_dir(verb).glob("*.yaml"))}
    if given.stem in shipped and given.name in (given.stem, given.stem + ".yaml"):
        return shipped[given.stem]
    near = difflib.get_close_matches(given.stem, shipped, n=3) or sorted(shipped)[:3]
    hint = f"; shipped recipes: {', '.join(near)} …" if near else ""
    raise UserError(f"{name}: no such recipe file{hint} (see `aimv2-vlm recipes list`)")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge, lists and scalars replace, null removes (the default comes back)."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _load_with_base(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: base: leads back to itself ({' -> '.join(p.name for p in (*seen, path))})")
    raw = load_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is a {type(raw).__name__}")
    base = raw.pop("base", None)
    _count_steps(raw)
    if base is None:
        return raw
    base_path = path.parent / str(base)
    if not base_path.is_file():
        raise UserError(f"{path}: base: {base} does not exist beside it")
    return merge(_load_with_base(base_path, (*seen, path)), raw)


def _count_steps(raw: dict[str, Any]) -> dict[str, Any]:
    """`optim.steps` with no `optim.epochs` beside it: the epochs of a base, of the recipe or of a default do not go before it."""
    if isinstance(optim := raw.get("optim"), dict) and optim.get("steps") is not None:
        optim.setdefault("epochs", None)
    return raw


def shown(value: Any, most: int = 200) -> str:
    """What was given, as a message may repeat it: not thousands of characters of it."""
    return cut(repr(value), most)


def cut(text: str, most: int = 200) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`a.b=value` words of the command line as a nested mapping; values are read as YAML."""
    tree: dict[str, Any] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{shown(word)}: overrides are written key=value, e.g. optim.lr=1e-4")
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{shown(word)}: {shown(parent)} was already given a plain value")
        node[last] = parse_yaml(value, f"override {cut(key)}") if value != "" else ""
    return tree


def _set_override(raw: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    # Unlike in a file, `key=null` on the command line is a value.
    merged = dict(raw)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _set_override(merged[key], value)
        elif isinstance(merged.get(key), list) and isinstance(value, dict) and all(k.isdigit() for k in value):
            items = list(merged[key])
            for index, item in value.items():
                if len(index) > 9 or int(index) >= len(items):
                    raise UserError(f"override {key}.{cut(index)}: the recipe has {len(items)} entries there (count from 0)")
                old = items[int(index)]
                items[int(index)] = _set_override(old, item) if isinstance(old, dict) and isinstance(item, dict) else item
            merged[key] = items
        else:
            merged[key] = value
    return merged


def _build(cls: type, raw: Any, where: str, file: str, default: Any = None) -> Any:
    """`raw` over `default` as an instance of dataclass `cls`; every error names file and key."""
    if not isinstance(raw, dict):
        raise UserError(f"{file}: {where or 'the recipe'}: expected a mapping of keys, got {shown(raw)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise UserError(f"{file}: unknown key {shown(name)}; the nearest valid key is '{_join(where, near[0])}'")
        allowed = fields[key].metadata.get("choices")
        if allowed and value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)
            raise UserError(f"{file}: {name}: {shown(value)} is none of {', '.join(allowed)}; did you mean {near[0]}?")
        values[key] = _coerce(hints[key], value, name, file, _default(fields[key]))
        _check_numbers(values[key], fields[key].metadata, name, file)
    return dataclasses.replace(default, **values) if default is not None else cls(**values)


def _check_numbers(value: Any, metadata: typing.Mapping[str, Any], name: str, file: str) -> None:
    """UserError where a number is not within what `config.bounded` declares, or a list has another length."""
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if len(numbers) != metadata.get("length", len(numbers)):
        raise UserError(f"{file}: {name}: expected {metadata['length']} numbers, got {shown(value)}")
    at_least, above, below, at_most = metadata.get("bounds", (None,) * 4)
    rules = ((at_least, "at least", operator.ge), (above, "above", operator.gt), (below, "below", operator.lt),
             (at_most, "at most", operator.le))
    for words, holds, bound in ((words, holds, bound) for bound, words, holds in rules if bound is not None):
        if not all(holds(number, bound) for number in numbers):
            raise UserError(f"{file}: {name}: must be {words} {bound:g}, got {shown(value)}")


def build(cls: type, raw: dict[str, Any], file: str) -> Any:
    """The recipe of class `cls` that a mapping of keys stands for; absent keys have their defaults. Raises UserError."""
    return _build(cls, raw, "", file)


def _default(spec: dataclasses.Field) -> Any:
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _coerce(hint: Any, value: Any, where: str, file: str, default: Any = None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            if option is str and isinstance(value, str) or typing.get_origin(option) is list and isinstance(value, list):
                return _coerce(option, value, where, file)
        return _coerce(options[0], value, where, file)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, file, default)
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{file}: {where}: expected a list, got {shown(value)}")
        return [_coerce(args[0], item, f"{where}.{i}", file) for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{file}: {where}: expected a mapping, got {shown(value)}")
        return {str(k): _coerce(args[1], v, f"{where}.{k}", file) for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{file}: {where}: expected {hint.__name__}, got {shown(value)}")


def _substitute(value: Any, data_root: str | None, file: str, where: str = "") -> Any:
    """`{data_root}` in any string; nothing else in braces is touched (they are brace globs)."""
    if isinstance(value, str) and "{data_root}" in value:
        if not data_root:
            raise UserError(f"{file}: {where}: needs data_root; add data_root=/path/to/data to the command")
        return value.replace("{data_root}", data_root.rstrip("/"))
    if isinstance(value, dict):
        return {k: _substitute(v, data_root, file, _join(where, str(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, data_root, file, f"{where}.{i}") for i, v in enumerate(value)]
    return value


def load_recipe(verb: str, name: str, overrides: list[str] = ()) -> Any:
    """The recipe `name` of `verb` (a key of FOLDERS) with `base:` files and `overrides` applied, checked key by key.

    Raises UserError naming file and key; nothing heavy has been imported by then.
    """
    path = find_recipe(verb, name)
    raw = _count_steps(_set_override(_load_with_base(path), _count_steps(parse_overrides(list(overrides)))))
    raw = _substitute(raw, raw.get("data_root"), str(path))
    recipe = build(_evaluation(raw, str(path)) if verb == "eval" else FOLDERS[verb], raw, str(path))
    if recipe.out is None:
        recipe.out = f"runs/{path.stem}"
    return recipe


def _evaluation(raw: dict[str, Any], file: str) -> type:
    """The class of an evaluation config by its `kind`."""
    kind = raw.get("kind", "benchmarks")
    if kind not in config.EVALUATIONS:
        raise UserError(f"{file}: kind: {shown(kind)} is none of {', '.join(config.EVALUATIONS)}")
    return config.EVALUATIONS[kind]


def to_dict(recipe: Any) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def dump(recipe: Any) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """The keys in which two resolved recipes differ, as `key: old -> new`."""
    lines = []
    for key in sorted(set(old) | set(new), key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, _join(where, str(key)))
        elif a != b:
            lines.append(f"{_join(where, str(key))}: {a!r} -> {b!r}")
    return lines


def shipped_recipes() -> list[tuple[str, Path]]:
    """(verb, file) of every recipe that ships with the package."""
    return [(verb, path) for verb in FOLDERS for path in sorted(recipes_dir(verb).glob("*.yaml"))]


def list_recipes() -> int:
    for verb, path in shipped_recipes():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{verb:9} {path.stem:32} {first}")
    return 0


def copy_recipes(folder: str) -> int:
    """All recipes into `folder/<pretrain|sft_recipes|eval_configs>`; files that are there already are kept."""
    for verb, path in shipped_recipes():
        target = Path(folder) / PLACES[verb] / path.name
        if target.exists():
            print(f"kept     {target}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        print(f"written  {target}")
    return 0
