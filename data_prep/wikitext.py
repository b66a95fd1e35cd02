"""Wikitext to plain paragraphs.

Blocks go first, in two passes that no input can make slow or deep: elements that hold no prose (comments,
references, formulas) the way MediaWiki's own preprocessor finds them, then templates, tables and links, innermost
first. What is left is cut into paragraphs, and mwparserfromhell reads the markup inside of those that have any: quotes,
HTML tags, external links. So it never sees a page's depth or size, which is what makes it slow.
"""

import html
import re
from collections.abc import Callable, Iterable, Iterator

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Text, Wikilink
from mwparserfromhell.parser import ParserError
from mwparserfromhell.wikicode import Wikicode

from data_prep.text import one_a_line


def names(listed: str) -> list[str]:
    return listed.split("|")


# Elements that go with all they hold. MediaWiki closes them at the first end tag; without one, the tag alone goes.
ELEMENTS = (
    "nowiki|ref|references|math|chem|ce|gallery|timeline|score|syntaxhighlight|source|pre|hiero|imagemap|graph|table|"
    "templatedata|mapframe|maplink|inputbox|categorytree|indicator|section|templatestyles|includeonly|style|script"
)
ELEMENT = re.compile(rf"<!--|<({ELEMENTS})(?=[\s/>])[^<>]*>", re.IGNORECASE)
ENDS = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in names(ELEMENTS)}
MARKUP_OR_ENTITY = re.compile(r"&#?\w+;|[\[\]{}|'<>=*#:;!_/-]")
BREAK = re.compile(r"</?(?:p|div|blockquote|center|poem|ul|ol|li|dl|dt|dd|h[1-6]|hr)(?=[\s/>])[^<>]*>", re.IGNORECASE)
SPACE = re.compile(r"<br(?=[\s/>])[^<>]*>", re.IGNORECASE)
SWITCH = re.compile(r"__[A-Z]{3,}__")
PARAMETER = re.compile(r"\{\{\{[^{}]*\}\}\}")

BRACKETS = re.compile(r"\{\{|\}\}|\[\[|\]\]|^[ \t:*#]*\{\||^[ \t:*#]*\|\}(?!\})", re.MULTILINE)
PAIRS = {"}}": "{{", "]]": "[[", "|}": "{|"}
MAX_DEPTH = 100  # MediaWiki itself expands templates no deeper
MAX_LINK = 1000  # characters; beyond, [[ and ]] belong to no one link

FILE = re.compile(
    r"(?i)[^:|\[\]]+:[^|\[\]]+\.(?:jpe?g|png|gif|svg|tiff?|webp|xcf|og[gav]|web[mp]|mp[34]|flac|wav|midi?|pdf|djvu)"
)
HIDDEN = re.compile(
    r"(?i)(?:file|image|media|datei|bild|fichier|archivo|imagen|ficheiro|imagem|immagine|bestand|afbeelding|plik|fil|"
    r"файл|изображение|category|kategorie|catégorie|categoría|categoria|categorie|kategoria|kategori|категория)\s*:"
)
# `[[de:Berlin]]` is a link to the same page in another language, shown beside the page, not in it.
INTERLANGUAGE = re.compile(r"(?:[a-z]{2,3}(?:-[a-z]+)*|simple|zh-min-nan)\s*:")

HEADING = re.compile(r"(={1,6})(.+?)\1\s*")
ITEM = re.compile(r"[*#:;]+\s*")
REMAINS = re.compile(r"[|!]|-{4,}")  # what lines of broken tables and templates begin with, and rules
LINK_SECTIONS = names(
    "references|reference|external links|external link|external sources|see also|further reading|notes|note|endnotes|"
    "further information|footnotes|notes and references|references and notes|references and sources|sources|"
    "notes and citations|notes and sources|bibliography|selected bibliography|citations|works cited|cited works|"
    "literature cited|general references|references and further reading|sources and further reading|"
    "bibliography and further reading|references and external links|citations and references|"
    "einzelnachweise|weblinks|siehe auch|literatur|anmerkungen|quellen|"
    "notes et références|références|liens externes|voir aussi|articles connexes|bibliographie|"
    "referencias|enlaces externos|véase también|bibliografía|notas"
)

INLINE = re.compile(r"''|<|\[|://|\{\{")
# mwparserfromhell reads on to the paragraph's end for each bit of markup that is never closed (50,000 × `<b>`: 69 s),
# up to 0.14 µs for each of them and each character. A paragraph with more markup than prose has (of a real page, up to
# 58 tokens, and 122,000 tokens × characters) is read by plain patterns instead.
MAX_TOKENS = 100
MAX_TOKENS_BY_LENGTH = 250_000
TOKENS = re.compile(r"''+|<|\[|://|[{}]{2}")
# The length of a URL's scheme is bounded, or a long run without spaces would take quadratic time.
PLAIN = [
    (re.compile(r"<[^<>]*>|'{2,}|\b[A-Za-z][A-Za-z0-9+.-]{0,20}://\S*|[\[\]{}]{2,}"), ""),
    (re.compile(r"\[([^\[\]]*)\]"), r"\1"),
]

NO_CHARACTER = re.compile(r"&#\d{8,};?")  # html.unescape fails at 4,300 digits
# What is left of `({{IPA|…}}; {{lang-zh|…}})` once templates are gone.
EMPTY_BRACKETS = re.compile(r"[ \xa0]*(?:\([\s,;:/–—-]*\)|\[[\s,;:/–—-]*\])")
OPEN_BRACKET = re.compile(r"(\()[\s,;]+")
CLOSE_BRACKET = re.compile(r"[\s,;]+(\))")
BEFORE_STOP = re.compile(r"\s+([,;.])(?=\s|$)")
REPEATED_STOP = re.compile(r"([,;])(?:\s*[,;])+")
# Quotes that paired with nothing: `''Eagle'''s` means Eagle's.
LEFT_QUOTES = re.compile(r"'+('s\b)|'{2,}")
LEFT_TAGS = re.compile(
    r"(?i)</?(?:abbr|b|bdi|big|cite|code|del|em|font|i|ins|kbd|q|ref|s|samp|small|span|strike|strong|sub|sup|tt|u|var)"
    r"(?:[\s/][^<>]*)?>"
)
LETTER = re.compile(r"\w")


def strip(wikitext: str) -> str:
    """The page's prose, one paragraph a line; headings and list items are paragraphs of their own. Never raises."""
    return one_a_line(tidy(inline(piece)) for piece in paragraphs(drop_brackets(drop_elements(wikitext))))


# Elements that hold no prose


def drop_elements(text: str) -> str:
    """Take out comments and the elements named above, and make block tags paragraph breaks."""
    pieces, position = [], 0
    never_ends = set()
    while match := ELEMENT.search(text, position):
        pieces.append(text[position : match.start()])
        position = match.end()
        if match[1] is None:
            end = text.find("-->", position)
            position = end + 3 if end >= 0 else len(text)
            continue
        name = match[1].lower()
        if match[0].endswith("/>") or name in never_ends:
            continue
        if end_tag := ENDS[name].search(text, position):
            if name == "nowiki":
                pieces.append(escape(text[position : end_tag.start()]))
            position = end_tag.end()
        else:
            never_ends.add(name)  # searched for once, or many unclosed tags would take quadratic time
    pieces.append(text[position:])
    text = "".join(pieces)
    return SWITCH.sub("", SPACE.sub(" ", BREAK.sub("\n\n", text)))


def escape(text: str) -> str:
    """Characters that could be markup, as entities, which are decoded last."""
    return MARKUP_OR_ENTITY.sub(lambda match: match[0] if match[0][0] == "&" else f"&#{ord(match[0])};", text)


# Templates, tables, links


def drop_brackets(text: str) -> str:
    """Resolve templates, tables and links, innermost first, with a stack of our own. What is never closed loses its
    brackets; of a template, also the rest of its first line. So does what lies deeper than MAX_DEPTH."""
    if "{{{" in text:
        text = PARAMETER.sub("", text)
    levels: list[list[str]] = [[]]  # the text of each open bracket so far; the page's own first
    opened: list[str] = []
    depths: dict[str, list[int]] = {kind: [] for kind in PAIRS.values()}
    too_deep = dict.fromkeys(depths, 0)
    position = 0
    for match in BRACKETS.finditer(text):
        token = match[0][-2:]
        levels[-1].append(text[position : match.start()])
        position = match.end()
        if token in depths and len(opened) == MAX_DEPTH:
            too_deep[token] += 1
        elif token in depths:
            depths[token].append(len(opened))
            opened.append(token)
            levels.append([])
        elif too_deep[PAIRS[token]]:
            too_deep[PAIRS[token]] -= 1
        elif depths[PAIRS[token]]:
            close_unmatched(levels, opened, depths, depths[PAIRS[token]][-1] + 1)
            depths[opened.pop()].pop()
            content = "".join(levels.pop())
            levels[-1].append(RESOLVE[token](content))
    levels[-1].append(text[position:])
    close_unmatched(levels, opened, depths, 0)
    return "".join(levels[0])


def close_unmatched(levels: list[list[str]], opened: list[str], depths: dict[str, list[int]], depth: int) -> None:
    """Give the text of brackets without an end, from `depth` on, to the level below them."""
    inner: list[list[str]] = []
    while len(opened) > depth:
        kind, pieces = opened.pop(), levels.pop()
        depths[kind].pop()
        if kind != "[[" or (pieces and HIDDEN.match(pieces[0])):
            cut_first_line(pieces)
        inner.append(pieces)
    for pieces in reversed(inner):
        levels[-1].extend(pieces)


def cut_first_line(pieces: list[str]) -> None:
    for index, piece in enumerate(pieces):
        end = piece.find("\n")
        pieces[index] = piece[end:] if end >= 0 else ""
        if end >= 0:
            return


def link(content: str) -> str:
    """What `[[content]]` shows: nothing for files, categories and other languages, else its text or its target."""
    target, bar, _ = content.partition("|")
    target = target.strip()
    if HIDDEN.match(target) or FILE.fullmatch(target):
        return ""
    if len(content) > MAX_LINK:
        return content
    if INTERLANGUAGE.match(target):
        return ""
    shown = content.rpartition("|")[2]
    if bar and not shown.strip():  # [[Java (island)|]]
        return target.split(" (")[0]
    return shown if bar else shown.lstrip(" :#")


def table(content: str) -> str:
    return "\n"


def template(content: str) -> str:
    """The text of the few templates that belong in a sentence; nothing of all others."""
    name, *arguments = content.split("|")
    name = name.strip().replace("_", " ").lower().removeprefix("template:")
    if name in SYMBOLS:
        return SYMBOLS[name]
    if name.startswith("lang-"):
        name = "lang-"
    if name in SHOWN:
        positional, named = split_arguments(arguments)
        return SHOWN[name](positional, named)
    if name.startswith("formatnum:"):
        return name.removeprefix("formatnum:")
    return ""


RESOLVE: dict[str, Callable[[str], str]] = {"}}": template, "]]": link, "|}": table}

NAMED = re.compile(r"\s*([\w-]{1,20})\s*=(?!=)")
MONTH_NAMES = names("January|February|March|April|May|June|July|August|September|October|November|December")
MONTHS = {str(number): month for number, month in enumerate(MONTH_NAMES, 1)}
RANGES = {"to": " to ", "and": " and ", "or": " or ", "by": " by ", "x": " × ", "×": " × ", "-": "–", "–": "–"}
Rendering = Callable[[list[str], dict[str, str]], str]


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Positional ones, `1=` among them, and named ones, white space off."""
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in arguments:
        match = NAMED.match(argument)
        if match is None:
            positional.append(argument.strip())
        elif match[1].isdecimal():
            positional.append(argument[match.end() :].strip())
        else:
            named[match[1]] = argument[match.end() :].strip()
    return positional, named


def first(positional: list[str], named: dict[str, str]) -> str:
    return positional[0] if positional else ""


def second(positional: list[str], named: dict[str, str]) -> str:
    return positional[1] if len(positional) > 1 else ""


def last(positional: list[str], named: dict[str, str]) -> str:
    return positional[-1] if positional else ""


def joined(positional: list[str], named: dict[str, str]) -> str:
    return "".join(positional)


def quotation(positional: list[str], named: dict[str, str]) -> str:
    return "\n\n" + (named.get("text") or named.get("quote") or first(positional, named)) + "\n\n"


def convert(positional: list[str], named: dict[str, str]) -> str:
    """`5|km|mi` → 5 km, `5|to|10|km` → 5 to 10 km, `6|ft|2|in` → 6 ft 2 in: as written, without the other unit."""
    if len(positional) >= 4 and positional[1] in RANGES:
        return f"{positional[0]}{RANGES[positional[1]]}{positional[2]} {positional[3]}"
    if len(positional) >= 4 and positional[1] in ("ft", "lb", "st", "mi", "yd") and positional[2][:1].isdigit():
        return " ".join(positional[:4])
    return " ".join(positional[:2])


def fraction(positional: list[str], named: dict[str, str]) -> str:
    """`1|2` → 1/2, `3|1|2` → 3 1/2."""
    *whole, over, under = positional if len(positional) > 1 else ["1", *positional, ""][:2]
    return " ".join([*whole, f"{over}/{under}"])


def value(positional: list[str], named: dict[str, str]) -> str:
    return f"{first(positional, named)} {named.get('u') or named.get('ul') or ''}".strip()


def as_of(positional: list[str], named: dict[str, str]) -> str:
    """`2007|5|30` → As of 30 May 2007."""
    if "alt" in named:
        return named["alt"]
    year, month, day = [*positional, "", "", ""][:3]
    month = MONTHS.get(month.lstrip("0"), month)
    start = "as of" if "lc" in named else "As of"
    return " ".join(part for part in (start, day, month, year) if part)


def date(positional: list[str], named: dict[str, str]) -> str:
    return " ".join(positional[:2])


def japanese(positional: list[str], named: dict[str, str]) -> str:
    inside = ", ".join(part for part in positional[1:3] if part)
    return f"{first(positional, named)} ({inside})"


def prefixed(prefix: str) -> Rendering:
    return lambda positional, named: prefix + first(positional, named)


SYMBOLS = {
    "ndash": "–", "en dash": "–", "endash": "–", "–": "–", "snd": " – ", "spnd": " – ", "spaced ndash": " – ",
    "spaced en dash": " – ", "dash": " – ", "mdash": "—", "em dash": "—", "emdash": "—", "spaced mdash": " — ",
    "nbsp": " ", "space": " ", "spaces": " ", "·": " · ", "dot": " · ", "•": " • ", "bull": " • ", "'": "'", "'s": "'s",
    "=": "=", "!": "|", "pi": "π", "okina": "ʻ", "sic": "[sic]", "bce": "BCE", "ce": "CE",
}  # fmt: skip
RENDERED: list[tuple[Rendering, str]] = [
    (first, "nowrap|nobr|small|smaller|big|larger|em|strong|abbr|tooltip|visible anchor|vanchor|unicode|math|mvar|var|"
            "code|mono|kbd|sup|sub|smallcaps|small caps|sc|ill|interlanguage link|lang-|polytonic|script|flag|"
            "flagcountry|angbr|not a typo|proper name|underline|linktext"),
    (second, "lang|rtl-lang|color|font color"),
    (last, "transl|transliteration|ipa|ipa link|ipalink|ipaslink|ipablink"),
    (joined, "chem|chem2|chemical formula"),
    (quotation, "quote|blockquote|bquote|cquote|quotation|quote box|poemquote|poem quote"),
    (convert, "convert|cvt"),
    (fraction, "frac|fraction|sfrac"),
    (value, "val"),
    (date, "oldstyledate"),
    (as_of, "as of"),
    (japanese, "nihongo"),
    (prefixed("c. "), "circa|c.|ca."),
    (prefixed("fl. "), "floruit|fl."),
    (prefixed("£"), "gbp|£"),
    (prefixed("₹"), "inr|₹"),
    *((prefixed(sign.upper()), sign) for sign in ("us$", "a$", "c$", "€")),
    *((prefixed(f"{ship.upper()} "), ship) for ship in ("uss", "hms", "ss", "rms", "hmcs", "hmas")),
]  # fmt: skip
SHOWN = {name: rendering for rendering, listed in RENDERED for name in names(listed)}


# Sections and paragraphs


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs with their markup, without sections that only list references or links, and without headings that
    nothing follows."""
    headings: list[tuple[int, str]] = []  # not given out yet
    for level, piece in split_lines(text):
        if level:
            while headings and headings[-1][0] >= level:
                headings.pop()
            headings.append((level, piece))
        elif LETTER.search(piece):
            yield from (title for _, title in headings)
            headings.clear()
            yield piece


def split_lines(text: str) -> Iterator[tuple[int, str]]:
    """(level, title) of every heading, (0, text) of every paragraph and list item."""
    held: list[str] = []
    left_out = 0  # the level of the section that is being left out
    for line in text.split("\n"):
        line = line.strip()
        heading = HEADING.fullmatch(line)
        item = ITEM.match(line)
        if held and (heading or item or not line or REMAINS.match(line)):
            yield 0, " ".join(held)
            held = []
        if heading:
            level, title = len(heading[1]), heading[2].strip()
            if not left_out or level <= left_out:
                left_out = level if is_link_section(title) else 0
                if not left_out:
                    yield level, title
        elif left_out or not line or REMAINS.match(line):
            continue
        elif item:
            yield 0, line[item.end() :]
        else:
            held.append(line)
    if held:
        yield 0, " ".join(held)


def is_link_section(title: str) -> bool:
    return title.strip("' :.").lower() in LINK_SECTIONS


# Markup inside of a paragraph


def inline(paragraph: str) -> str:
    """The paragraph's text, entities decoded."""
    if INLINE.search(paragraph):
        try:
            parsed = is_parsed(paragraph)
            paragraph = "".join(shown(mwparserfromhell.parse(paragraph))) if parsed else strip_plainly(paragraph)
        except (ParserError, RecursionError):
            paragraph = strip_plainly(paragraph)
        if "''" in paragraph:
            paragraph = LEFT_QUOTES.sub(r"\1", paragraph)
        if "<" in paragraph:
            paragraph = LEFT_TAGS.sub("", paragraph)
    return decode_entities(paragraph)


def is_parsed(paragraph: str) -> bool:
    """Whether mwparserfromhell reads a paragraph with markup: there is no more of it than prose has."""
    num_tokens = len(TOKENS.findall(paragraph))
    return num_tokens <= MAX_TOKENS and num_tokens * len(paragraph) <= MAX_TOKENS_BY_LENGTH


def decode_entities(text: str) -> str:
    return html.unescape(NO_CHARACTER.sub("\ufffd", text)) if "&" in text else text


def shown(code: Wikicode) -> Iterator[str]:
    for node in code.nodes:
        if isinstance(node, Text):
            yield node.value
        elif isinstance(node, HTMLEntity):
            yield str(node)
        elif isinstance(node, Tag):
            if node.contents is not None:
                yield from shown(node.contents)
        elif isinstance(node, ExternalLink):
            if node.title is not None:
                yield from shown(node.title)
        elif isinstance(node, Heading):
            yield from shown(node.title)
        elif isinstance(node, Wikilink):
            yield from shown(node.text if node.text is not None else node.title)


def strip_plainly(paragraph: str) -> str:
    for pattern, replacement in PLAIN:
        paragraph = pattern.sub(replacement, paragraph)
    return paragraph


def tidy(paragraph: str) -> str:
    """Mend the sentence where something was taken out of it; nothing is left of one without a letter or digit."""
    paragraph = " ".join(paragraph.split())  # first, so that no pattern meets a long run of spaces or stops
    paragraph = REPEATED_STOP.sub(r"\1", BEFORE_STOP.sub(r"\1", paragraph))
    if "(" in paragraph or "[" in paragraph:
        paragraph = EMPTY_BRACKETS.sub("", CLOSE_BRACKET.sub(r"\1", OPEN_BRACKET.sub(r"\1", paragraph)))
    return paragraph if LETTER.search(paragraph) else ""
