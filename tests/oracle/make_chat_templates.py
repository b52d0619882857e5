"""Writes tests/fixtures/chat_templates/{cases,expressions}.json: what jinja2, set up as the transformers
library sets it up, makes of the template files there and of the expressions below.

Run with a Python that has transformers and jinja2:  python tests/oracle/make_chat_templates.py
With a folder of other templates and an output file, only the cases of those are written there, for
chat_template_test OUTPUT FOLDER.
"""
import datetime
import json
import pathlib
import sys

import jinja2
import transformers.utils.chat_template_utils as chat

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures" / "chat_templates"
NOW = 1753963267  # 2025-07-31 12:01:07 UTC


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(NOW, datetime.timezone.utc).replace(tzinfo=None)


chat.datetime = FixedClock


def render(source, variables):
    """{"text": …}, {"refuses": …} for raise_exception, or {"fails": …}."""
    try:
        text = chat._compile_jinja_template(source).render(**variables)
        text.encode()
        return {"text": text}
    except jinja2.exceptions.TemplateError as e:
        if type(e) is jinja2.exceptions.TemplateError:
            return {"refuses": str(e)}
        return {"fails": f"{type(e).__name__}: {e}"}
    except Exception as e:  # Python's own errors within the template
        return {"fails": f"{type(e).__name__}: {e}"}


def tool(name, description, properties, required):
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": properties, "required": required}}}


TOOLS = [
    tool("get_weather", "The weather of a place <now>", {
        "city": {"type": "string", "description": "City & country, \"like\" 'Ulm, DE'"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        "days": {"type": "integer", "description": "How many days", "nullable": True}}, ["city"]),
    tool("search", "Finds pages — schnell", {
        "queries": {"type": "array", "items": {"type": "string"}, "description": "What to find"},
        "filter": {"type": "object", "properties": {
            "lang": {"type": "string"}, "year": {"type": ["integer", "null"]}},
            "required": ["lang"]},
        "ratio": {"type": "number", "default": 0.5},
        "safe": {"type": "boolean", "default": True}}, ["queries"]),
    tool("clock", "No arguments", {}, []),
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name, arguments, identity="call00001"):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "one question": dict(messages=[user("What is 2+2?")]),
    "with system": dict(messages=[system("Be brief."), user("Hi"), assistant("Hello!"), user("Why?")]),
    "odd text": dict(messages=[system("  Zeilen\n\nund \"Zitate\" "), user("  Grüße 🌍\n'x' <|im_end|> {{ no }}\t"),
                               assistant(" <b>ja</b> & so\n"), user("\n")]),
    "not generating": dict(messages=[user("a"), assistant("b")], add_generation_prompt=False),
    "ends with the assistant": dict(messages=[user("a"), assistant("b"), user("c"), assistant("d  ")],
                                    add_generation_prompt=False),
    "two users in a row": dict(messages=[user("a"), user("b")]),
    "no messages": dict(messages=[]),
    "parts": dict(messages=[system("S"), {"role": "user", "content": [
        {"type": "text", "text": "look "}, {"type": "text", "text": "here"}]}]),
    "an image": dict(messages=[{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "What is this?"}]}]),
    "tools offered": dict(messages=[system("Use tools."), user("Weather in Ulm?")], tools=TOOLS),
    "tools without system": dict(messages=[user("Weather in Ulm?")], tools=TOOLS[:1]),
    "tool called": dict(messages=[
        user("Weather in Ulm?"),
        assistant("", tool_calls=[call("get_weather", {"city": "Ulm", "days": 2})]),
        {"role": "tool", "name": "get_weather", "content": "{\"t\": 21.5}", "tool_call_id": "call00001"},
    ], tools=TOOLS),
    "tools called twice": dict(messages=[
        system("S"), user("Weather?"),
        assistant("I look.", tool_calls=[call("get_weather", {"city": "Ulm"}),
                                         call("search", {"queries": ["ä", "b"], "safe": None}, "call00002")]),
        {"role": "tool", "name": "get_weather", "content": "21", "tool_call_id": "call00001"},
        {"role": "tool", "name": "search", "content": "nothing", "tool_call_id": "call00002"},
        assistant("It is 21."), user("Thanks"),
    ], tools=TOOLS),
    "null content": dict(messages=[user("x"), {"role": "assistant", "content": None,
                                               "tool_calls": [call("clock", {})]},
                                   {"role": "tool", "content": "12:00", "tool_call_id": "call00001"}],
                         tools=TOOLS),
    "thinking": dict(messages=[user("1+1?"), assistant("<think>\nadd\n</think>\n\n2"), user("2+2?"),
                               assistant("4", reasoning_content="I add.", thinking="I add."), user("3+3?")]),
    "thinking off": dict(messages=[user("1+1?")], enable_thinking=False, thinking=False, reasoning_effort="low"),
    "developer": dict(messages=[{"role": "developer", "content": "Answer in verse."}, user("Hi")], tools=TOOLS),
    "unknown role": dict(messages=[{"role": "narrator", "content": "Night fell."}, user("Hi")]),
}

TOKENS = {  # by how a template's name begins
    "": dict(bos_token="<s>", eos_token="</s>"),
    "llama-3": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    "gemma": dict(bos_token="<bos>", eos_token="<eos>"),
    "deepseek": dict(bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>"),
    "olmo": dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
    "qwen": dict(eos_token="<|im_end|>"),
}


def variables_of(template, conversation):
    prefix = max((p for p in TOKENS if template.startswith(p)), key=len)
    return {"add_generation_prompt": True, "tools": None, "documents": None, **TOKENS[prefix],
            **CONVERSATIONS[conversation]}


def model_cases(folder):
    """Each template with each conversation; what they share is written once."""
    for path in sorted(folder.glob("*.jinja")):
        source = path.read_bytes().decode()
        for name in CONVERSATIONS:
            variables = variables_of(path.name, name)
            tokens = {k: v for k, v in variables.items() if k.endswith("_token")}
            yield {"template": path.name, "name": name, "tokens": tokens, **render(source, variables)}


CONTEXT = {
    "n": 7, "f": 2.5, "t": True, "none_": None, "s": "Hello, World", "u": "Grüße an 🌍 ẞ", "e": "",
    "l": [3, 1, 2], "ls": ["b", "A", "c", "a"], "d": {"b": 1, "a": [1, {"x": None}], "items": 5, "Z": "q"},
    "users": [{"name": "Ann", "age": 30, "tags": ["x"]}, {"name": "bob", "age": 25, "tags": []},
              {"name": "Cid", "age": 30}],
    "html": "<a href=\"x\">'&'</a>", "lines": "one\n  two\n\nthree\n", "ws": " \t x y \n",
    "big": 9007199254740993, "small": -3, "floats": [0.1, 1e22, 1e-7, 100.0, 1e16, 123456789.125, -0.0],
    "nested": [[1, 2], [3, [4, 5]], []],
}


def expression_cases():
    for line in (HERE / "chat_template_expressions.txt").read_text().split("\n===\n"):
        if line:
            yield {"source": line, **render(line, CONTEXT)}


def lines(cases):
    return "[\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "\n]"


def counted(what, cases):
    cases = list(cases)
    kinds = [next(k for k in ("text", "refuses", "fails") if k in c) for c in cases]
    print(what, len(cases), {k: kinds.count(k) for k in sorted(set(kinds))})
    return cases


def write_model_cases(folder, path):
    cases = counted(path, model_cases(folder))
    path.write_text('{"now": %d,\n"conversations": %s,\n"cases": %s}\n' % (
        NOW, json.dumps(CONVERSATIONS, ensure_ascii=False, indent=1), lines(cases)))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write_model_cases(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
        sys.exit()
    write_model_cases(FIXTURES / "templates", FIXTURES / "cases.json")
    expressions = counted("expressions", expression_cases())
    (FIXTURES / "expressions.json").write_text('{"now": %d,\n"variables": %s,\n"cases": %s}\n' % (
        NOW, json.dumps(CONTEXT, ensure_ascii=False), lines(expressions)))
