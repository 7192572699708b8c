# SPDX-License-Identifier: Apache-2.0
"""Chat templates: messages to pieces of text, and which pieces are the assistant's.

The tokenizer's own template is used, or a named one of TEMPLATES. What is trained is recorded while
rendering, never searched for afterwards:

- a template with `{% generation %}` marks says it itself;
- else each assistant turn is the difference between the chat rendered up to it (with the prompt for
  a reply) and the chat rendered up to and including it. This needs a template whose rendering of a
  chat begins with the rendering of its beginning; one that rewrites earlier turns is refused.

Text inside messages never becomes a turn: control tokens are recognised only where the template
wrote them (see `tokenizer.Codec`).
"""

import dataclasses
import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.sources import RowError, nearest
from jaxrlhf.data.tokenizer import Codec, codec
from jaxrlhf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Piece = tuple[str, bool]  # text with control tokens as aliases, and whether it is trained

MAX_RENDERED = 16 * 1024 * 1024  # characters a template may produce
MAX_STEPS = 200_000  # loop steps over range() a template may take

_NONCE = secrets.token_hex(8)
_START, _END = f"zg{_NONCE}gsz", f"zg{_NONCE}gez"


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template in Jinja.

    markers: strings that delimit turns. If `atomic`, each must be one control token of the
        tokenizer; else they are ordinary text, and a message that contains one is refused.
    stop: what ends an assistant's turn, besides EOS.
    """

    name: str
    source: str
    markers: tuple[str, ...] = ()
    atomic: bool = False
    stop: str | None = None


_CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_LLAMA3 = """\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_GEMMA = """\
{{ bos_token }}\
{% set ns = namespace(system='') %}\
{% for message in messages %}\
{% if message['role'] in ['system', 'developer'] %}\
{% set ns.system = ns.system + message['content'] | trim + '\\n\\n' %}\
{% else %}\
{% set role = 'model' if message['role'] == 'assistant' else 'user' %}\
{{ '<start_of_turn>' + role + '\\n' + ns.system + message['content'] | trim + '<end_of_turn>\\n' }}\
{% set ns.system = '' %}\
{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_PLAIN = """\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}\
{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}\
{% else %}{{ message['role'] | capitalize + ': ' + message['content'] }}{% endif %}\
{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_HH = """\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}\
{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}\
{% else %}{{ message['content'] }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"""

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # Qwen, Yi and many more
        Template("chatml", _CHATML, ("<|im_start|>", "<|im_end|>"), True, "<|im_end|>"),
        Template(
            "llama3",
            _LLAMA3,
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            True,
            "<|eot_id|>",
        ),
        Template("gemma", _GEMMA, ("<start_of_turn>", "<end_of_turn>"), True, "<end_of_turn>"),
        # for any tokenizer: headings in words, EOS after each reply
        Template("plain", _PLAIN, ("\n\nUser:", "\n\nAssistant:", "\n\nSystem:", "\n\nTool:")),
        # exactly the text of Anthropic's HH-RLHF; no stop inside the dialogue
        Template("hh", _HH, ("\n\nHuman:", "\n\nAssistant:")),
    )
}


def choose_template(
    tokenizer: "PreTrainedTokenizerBase", name: str | None = None, *, default: str | None = None
) -> Template:
    """The named template; the tokenizer's own without a name; `default` where it has none.

    Raises:
        DataError: no template at all, an unknown name, or one whose turn markers are no tokens of
            this tokenizer (as plain text anybody could write them, and a turn could be forged).
    """
    own = _own(tokenizer)
    if name is None and own:
        return own
    name = name or default
    if name is None:
        raise DataError(
            "the data holds chats, but the tokenizer has no chat template: set data.template to "
            f"one of {', '.join(TEMPLATES)}"
        )
    if name in ("tokenizer", "own"):
        if not own:
            raise DataError("data.template=tokenizer, but the tokenizer has no chat template")
        return own
    if name not in TEMPLATES:
        raise DataError(
            f"data.template={name!r} is not known{nearest(name, TEMPLATES)}; "
            f"templates are {', '.join(TEMPLATES)} or tokenizer (its own)"
        )
    template = TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    lacking = [m for m in template.markers if template.atomic and m not in vocabulary]
    if lacking:
        raise DataError(
            f"data.template={name} marks turns with the tokens {', '.join(template.markers)}; this "
            f"tokenizer lacks {', '.join(lacking)}. Use the tokenizer's own template, or "
            "data.template=plain, which needs no such tokens, or give them to the model: "
            f"model.add_tokens='[{', '.join(lacking)}]' model.resize_embeddings=true"
        )
    return template


def _own(tokenizer: "PreTrainedTokenizerBase") -> Template | None:
    """The tokenizer's own template; one of ours that it was given keeps its markers."""
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        source = source.get("default") or next(iter(source.values()), None)
    if not source:
        return None
    known = (template for template in TEMPLATES.values() if template.source == source)
    return dataclasses.replace(next(known, Template("", source)), name="tokenizer")


def stop_ids(tokenizer: "PreTrainedTokenizerBase", template: Template | None = None) -> list[int]:
    """Ids at which a reply ends: EOS, and the template's end of turn."""
    found = [tokenizer.eos_token_id]
    if template is not None and template.name == "tokenizer":
        try:
            pieces = render(
                template,
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                tokenizer,
            )
            trained = [text for text, mask in pieces if mask]
            ids = codec(tokenizer).encode(trained[-1:], continued=True)[0] if trained else []
            if ids and ids[-1] in codec(tokenizer).control_ids:
                found.append(ids[-1])
        except DataError:
            pass  # a template that refuses this little chat only leaves EOS
    elif template is not None and template.stop is not None:
        found.append(tokenizer.convert_tokens_to_ids(template.stop))
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))


def render(
    template: Template,
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    completion_from: int | None = None,
    reply: bool = False,
    tools: Any = None,
) -> list[Piece]:
    """A chat as pieces of text, each trained or not; encode each and lay the ids end to end.

    The cuts lie around every assistant turn, trained or not, so that a turn has the same ids when
    it is trained, when it stands in a prompt, and as it was sampled.

    completion_from: only assistant turns at or after this index are trained (None = all of them).
    reply: end with the template's prompt for a reply (sampling).
    tools: handed to the template.

    Raises:
        DataError: the template fails, rewrites earlier turns, or a message holds its markers.
    """
    kit = codec(tokenizer)
    messages = [_protect(m, template, kit) for m in messages]

    def chat(n: int, prompt: bool) -> str:
        return _run(template, messages[:n], tokenizer, tools=tools, add_generation_prompt=prompt)

    first = 0 if completion_from is None else completion_from
    whole = chat(len(messages), reply)
    if _START in whole:
        pieces = _generation_pieces(whole)
        if completion_from:
            before = chat(completion_from, False).replace(_START, "").replace(_END, "")
            pieces = _untrained_until(pieces, len(before))
    else:
        pieces, at = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            end = chat(index + 1, False)
            begin = chat(index, True) if index else _opening(chat)
            if not end.startswith(begin):
                # some prompts for a reply open a block the finished turn lacks (<think>)
                begin = _common(begin, end) if end.startswith(chat(index, False)) else ""
            if not begin or not whole.startswith(end) or len(begin) < at:
                raise DataError(
                    f"the chat template {template.name!r} does not keep earlier turns as they were "
                    f"(turn {index} of {len(messages)} changes when more follows), so what is "
                    "trained cannot be told; mark it with {% generation %} in the template, or set "
                    f"data.template to one of {', '.join(TEMPLATES)}"
                )
            # white space after the end-of-turn token is never generated
            stop = len(end.rstrip())
            end_of_turn = any(end[:stop].endswith(s) for s in kit.control)
            cut = stop if end_of_turn and stop > len(begin) else len(end)
            pieces += [(whole[at : len(begin)], False), (whole[len(begin) : cut], index >= first)]
            at = cut
        pieces.append((whole[at:], False))
    return [(kit.show(kit.alias(text)), mask) for text, mask in pieces if text]


def _opening(chat: Callable[[int, bool], str]) -> str:
    """What stands before the reply of a chat that begins with one."""
    try:
        return chat(0, True)
    except RowError:  # many templates look at the first message: without one they fail
        turn = chat(1, False)
    heading = chat(1, True).removeprefix(turn)
    return turn[: turn.find(heading) + len(heading)] if heading in turn else ""


def _common(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def _generation_pieces(whole: str) -> list[Piece]:
    pieces: list[Piece] = []
    trained = False
    for text in re.split(f"({_START}|{_END})", whole):
        if text in (_START, _END):
            trained = text == _START
        else:
            pieces.append((text, trained))
    return pieces


def _untrained_until(pieces: Sequence[Piece], length: int) -> list[Piece]:
    found: list[Piece] = []
    for text, trained in pieces:
        cut = min(max(length, 0), len(text))
        length -= len(text)
        found += [(text[:cut], False), (text[cut:], trained)]
    return found


def _protect(message: Message, template: Template, kit: Codec) -> Message:
    """The message with control tokens hidden that are only spelled inside its text."""

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return kit.hide(value)
        if isinstance(value, list):
            return [hide(v) for v in value]
        if isinstance(value, dict):
            return {k: hide(v) for k, v in value.items()}
        return value

    if not template.atomic:
        for marker in template.markers:
            if marker in message["content"]:
                raise RowError(
                    f"a turn of role {message['role']} contains {marker.strip()!r}, which the "
                    f"template {template.name!r} uses as a heading: it would become a turn"
                )
    return {k: v if k == "role" else hide(v) for k, v in message.items()}


# --- running Jinja ---------------------------------------------------------------------------


def _run(
    template: Template,
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tools: Any,
    add_generation_prompt: bool,
) -> str:
    import jinja2

    special = {
        k: str(v)
        for k, v in tokenizer.special_tokens_map.items()
        if not isinstance(v, (list, dict))
    }
    special = {"bos_token": "", "eos_token": "", **special}
    try:
        text = _compile(template.source).render(
            messages=list(messages),
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        OverflowError,
        ZeroDivisionError,
        AttributeError,
        MemoryError,
        RecursionError,
    ) as error:
        raise RowError(
            f"the chat template {template.name!r} fails: {error or type(error).__name__}"
        ) from error
    if len(text) > MAX_RENDERED:
        raise RowError(
            f"the chat template {template.name!r} produced over {MAX_RENDERED} characters"
        )
    return text


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    """A template in a sandbox that cannot change objects, loop for ever, or build huge strings."""
    import jinja2
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def bounded(size: float) -> None:
        if size > MAX_RENDERED:
            raise jinja2.TemplateError("a text or number this large is not allowed")

    class Generator(CodeGenerator):
        """Has `a ~ b` checked as well, which is no operator to the sandbox."""

        def visit_Concat(self, node, frame):
            self.write("environment.bounded_concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context, operator, left, right):
            sized = (str, list, tuple)
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                bounded(left.bit_length() * abs(right))
            elif operator == "*":
                for text, times in ((left, right), (right, left)):
                    if isinstance(text, sized) and isinstance(times, int):
                        bounded(len(text) * times)
            elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
                bounded(len(left) + len(right))
            elif operator == "%" and isinstance(left, str):
                bounded(max((int(n) for n in re.findall(r"\d+", left)), default=0))
            return super().call_binop(context, operator, left, right)

        def bounded_concat(self, parts):
            texts = [str(part) for part in parts]
            bounded(sum(map(len, texts)))
            return "".join(texts)

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return _START + caller() + _END

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = fail
    # A date inside a prompt would make the data depend on the day it was read.
    env.globals["strftime_now"] = lambda form: datetime.date(2024, 7, 26).strftime(form)
    try:
        compiled = env.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja (line {error.lineno}): {error.message}"
        ) from error

    class Bounded:
        """Counts steps of range() anew in every rendering."""

        def render(self, **variables: Any) -> str:
            steps = 0

            def bounded_range(*args: int) -> range:
                nonlocal steps
                found = range(*args)
                steps += len(found)
                if steps > MAX_STEPS:
                    raise jinja2.TemplateError(f"more than {MAX_STEPS} loop steps")
                return found

            return compiled.render(range=bounded_range, **variables)

    return Bounded()
