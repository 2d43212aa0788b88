"""A SentencePiece BPE model rebuilt as a fast tokenizer whose ids and texts equal its own.

transformers has a conversion too (`SpmConverter.build_tokenizer_from_spm_proto`), which is not used
here: in version 5.24 it is exact for Baichuan's and LLaMA's settings, but of 3,043 test texts 257
differ for models that remove extra spaces, 39 with user-defined symbols, and 1 with a character map
where spaces are kept; and it merges pieces of equal score by id, not from the left.
"""

import collections
import graphlib
import pathlib
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

Merge = tuple[str, str]

_SPACE = "▁"  # SentencePiece's U+2581


def read_model(path: pathlib.Path) -> tuple[Any, Any]:
    """Opens a SentencePiece BPE model as a processor and as its protocol buffer."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(
            f"{path}: reading it takes the package {error.name or 'sentencepiece'!r}; "
            "run `pip install sentencepiece protobuf`"
        ) from error
    content = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)
        processor.id_to_piece(0)  # an empty file is read without complaint
    except Exception as error:  # protobuf's DecodeError is not a ValueError
        raise ValueError(f"{path}: not a SentencePiece model, or a damaged one") from error
    trainer, pieces = proto.trainer_spec, proto.pieces
    shorts = [piece for piece in pieces if len(piece.piece) == 1]
    for problem, found in (
        ("is not BPE", trainer.model_type != trainer.BPE),
        ("marks spaces as suffixes", trainer.treat_whitespace_as_suffix),
        ("has pieces marked unused", any(piece.type == piece.UNUSED for piece in pieces)),
        (
            "has a control piece of one character",
            any(piece.type == piece.CONTROL for piece in shorts),
        ),
        ("changes text on decoding", proto.denormalizer_spec.precompiled_charsmap),
    ):
        if found:
            raise ValueError(f"{path}: this model {problem}, which cannot be rebuilt exactly")
    return processor, proto


def build(path: pathlib.Path, processor: Any, proto: Any) -> tokenizers.Tokenizer:
    """Assembles the pipeline that gives SentencePiece's ids."""
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    known = set(scores).union("".join(symbols))
    for piece in scores:
        if not known.issuperset(piece):
            raise ValueError(f"{path}: piece {piece!r} has a character that is not a piece itself")
    options = {
        "vocab": vocabulary,
        "merges": _ordered_merges(path, scores),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }
    backend = tokenizers.Tokenizer(models.BPE(**options))
    backend.normalizer = _normalizer(path, processor, proto.normalizer_spec, symbols)
    backend.decoder = _decoder(proto.normalizer_spec)
    if symbols:
        # SentencePiece cuts its user-defined symbols out first, the longest one at each position.
        longest_first = sorted(symbols, key=len, reverse=True)
        cut = pre_tokenizers.Split(Regex("|".join(map(_escape, longest_first))), "isolated")
        backend.pre_tokenizer = cut
        if len(longest_first[0]) > 1:
            # A symbol of several characters has no merges: `ignore_merges` takes a whole word that
            # is in the vocabulary. Words in it that BPE would spell otherwise are cut up before.
            words = [piece.piece for piece in proto.pieces if piece.type != piece.USER_DEFINED]
            exceptions = _spelled_out(backend.model, cut, words)
            backend.model = models.BPE(**options, ignore_merges=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([cut, *exceptions])
    return backend


def _ordered_merges(path: pathlib.Path, scores: dict[str, float]) -> list[Merge]:
    """Lists every pair of pieces that makes a piece, best score first.

    SentencePiece merges the pair whose result scores highest, the leftmost of equals; `tokenizers`
    takes the lowest place in this list, then the leftmost.
    """
    by_score: dict[float, list[Merge]] = collections.defaultdict(list)
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                by_score[score].append((left, right))
    merges: list[Merge] = []
    for score in sorted(by_score, reverse=True):
        try:
            merges += _leftmost_first(by_score[score], scores)
        except graphlib.CycleError as error:
            raise ValueError(f"{path}: overlapping pieces of score {score} defy order") from error
    return merges


def _leftmost_first(merges: list[Merge], scores: dict[str, float]) -> list[Merge]:
    """Orders merges of one score so that of two that overlap, the left one comes first.

    Merges (a, b) and (b, c) overlap if the symbols a b c become neighbours. No merge has crossed
    their ends then, so the text abc alone decides whether that can happen.
    """
    followers: dict[str, list[Merge]] = {right: [] for _, right in merges}
    for merge in merges:
        followers.setdefault(merge[0], []).append(merge)
    earlier: dict[Merge, list[Merge]] = {merge: [] for merge in merges}
    for first in merges:
        for second in followers[first[1]]:
            if second != first and _can_meet([*first, second[1]], scores):
                earlier[second].append(first)
    return list(graphlib.TopologicalSorter(earlier).static_order())


def _can_meet(wanted: list[str], scores: dict[str, float]) -> bool:
    symbols = list("".join(wanted))
    while len(symbols) > len(wanted):
        pairs = [left + right for left, right in zip(symbols, symbols[1:], strict=False)]
        place = max(range(len(pairs)), key=lambda i: (scores.get(pairs[i], -float("inf")), -i))
        if pairs[place] not in scores:
            return False
        symbols[place : place + 2] = [pairs[place]]
    return symbols == wanted


def _spelled_out(model: models.BPE, cut: Any, words: list[str]) -> list[Any]:
    """Splits that keep whole words such as `<0x0A>` from being taken for their entry.

    Each is cut at the first boundary that BPE leaves in it, which no merge crosses.
    """
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = cut
    patterns = []
    for word, encoding in zip(words, plain.encode_batch(words), strict=True):
        if encoding.tokens != [word] and set(encoding.word_ids) == {0}:
            end = encoding.offsets[0][1]
            patterns.append(f"\\A{_escape(word[:end])}(?={_escape(word[end:])}\\z)")
    return [pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")] if patterns else []


def _normalizer(
    path: pathlib.Path, processor: Any, spec: Any, symbols: list[str]
) -> normalizers.Normalizer | None:
    """Returns SentencePiece's normalizer: character map, spaces removed, prefix, space marks.

    A character map is exact but for a mapped character with a combining mark (full-width `Á`).
    """
    space = _SPACE if spec.escape_whitespaces else " "
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        # `Precompiled` keeps the first match of a whole grapheme, so it would lose half of a
        # two-character line break, and it composes no grapheme of six bytes or more.
        if processor.normalize("x\r\nx") == processor.normalize("x\n\nx"):
            steps.append(normalizers.Replace("\r\n", "\n\n"))
        if processor.normalize("\u304b\u3099").endswith("\u304c"):
            steps.append(normalizers.NFC())
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        mapped = normalizers.Sequence(steps)
        for symbol in symbols:
            if mapped.normalize_str(symbol) != symbol:
                raise ValueError(f"{path}: the character map changes the user symbol {symbol!r}")
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{space}+\\z"), ""))
    return normalizers.Sequence(steps) if steps else None


def _decoder(spec: Any) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.escape_whitespaces and (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        # A text whose extra spaces are removed never starts with one: then strip them all.
        steps.append(decoders.Strip(" ", 1_000_000 if spec.remove_extra_whitespaces else 1, 0))
    return decoders.Sequence(steps)


def _escape(text: str) -> str:
    """Writes text as a literal in each regular expression dialect of `tokenizers`."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)
