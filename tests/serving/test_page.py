"""The web page in a browser: conversations, comparisons, preferences, and texts that attack it."""

import base64
import hashlib
import json
import re
import threading

import pytest

from huatuo_jax.data.readers import read_comparisons, read_dialogues
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.preferences.data import (
    ComparisonsConfig,
    ComparisonSource,
    answers_of,
    open_comparisons,
)
from tests import browser, tiny
from tests.serving.scripted_chat import CUT, HOLD, PAGE, Fail, Refuse, ScriptedChat

IDLE = "!document.querySelector('.writing') && at('send').type === 'submit'"
BODIES = "[...document.querySelectorAll('.body')].map(one => one.innerText.trim())"
BRIGHTNESS = """["backgroundColor", "color"].map(
  name => getComputedStyle(document.body)[name].match(/\\d+/g)
    .reduce((sum, part) => sum + Number(part), 0))"""
CUT_LABELS = """[...document.querySelectorAll("button, label")]
  .filter(one => one.offsetParent && !one.matches(".pick, .out"))
  .filter(one => one.scrollWidth > one.clientWidth + 1)
  .map(one => one.textContent)"""
NAMELESS = """[...document.querySelectorAll("button, select, textarea, input")]
  .filter(one => one.checkVisibility() && !one.getAttribute("aria-label"))
  .filter(one => !one.textContent.trim() && !one.labels?.length)
  .map(one => one.outerHTML)"""
FAINT = """[...document.querySelectorAll("body *")].filter(one => one.offsetParent
    && [...one.childNodes].some(child => child.nodeType === 3 && child.data.trim())
    && !one.closest("[disabled], .out, .skip, option")).filter(one => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  let behind = one;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [low, high] = [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor]
    .map(numbers).map(light).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05) < 4.5;
}).map(one => `${one.tagName} ${one.className} ${one.textContent}`)"""


@pytest.fixture(scope="module")
def browser_page():
    with browser.chromium() as opened:
        yield opened


@pytest.fixture
def page(browser_page):
    browser_page.requests.clear()
    browser_page.errors.clear()
    browser_page.size(1280, 800)
    return browser_page


def until(page, condition):
    """Waits until an expression is true in the page."""
    page.run(
        "new Promise(go => { const look = () => Boolean(" + condition + ") ? go(true)"
        " : setTimeout(look, 5); look(); })"
    )


def enter(page, server, **changed):
    """Opens the server's page, with other settings than the first visit's."""
    page.open(server.address)
    page.run(f"Object.assign(settings, {json.dumps(changed)}); saveSettings(); draw()")
    until(page, "connected || at('key-dialog').open")


def ask(page, text, *, wait=True):
    page.run("at('text').focus()")
    page.type(text)
    page.press("Enter")
    if wait:
        until(page, IDLE)


def bodies(page):
    return page.run(BODIES)


def stored(page):
    return page.run("Object.entries(localStorage).map(one => one.join('=')).join('\\n')")


def told(body):
    return [(one["role"], one["content"]) for one in body["messages"]]


def echo(body, index):
    """Answers with the number of the question, in pieces that cut Markdown apart."""
    number = sum(one["role"] == "user" for one in body["messages"])
    return [f"第 {number} 答：*", "*多喝水*", "*。"]


def test_a_conversation_of_three_turns_streams_stops_and_is_there_after_a_reload(page):
    def answer(body, index):
        number = sum(one["role"] == "user" for one in body["messages"])
        if number == 3 and not server.left.is_set():
            return ["先", HOLD]
        return [f"答 {number} ", HOLD if number == 1 else "", "**完**"]

    with ScriptedChat(answer) as server:
        enter(page, server)
        ask(page, "头痛", wait=False)
        until(page, f"({BODIES})[0] === '答 1'")  # Shown before the server has written it all.
        assert page.run("at('thread').getAttribute('aria-busy')") == "true"
        server.released.set()
        until(page, IDLE)
        assert bodies(page) == ["答 1 完"]
        assert "答 1 **完**" in page.run("at('status').textContent")
        server.released.clear()
        ask(page, "发烧")
        ask(page, "咳嗽", wait=False)
        until(page, f"({BODIES})[2] === '先'")
        assert page.run("at('send').getAttribute('aria-label')") == "Stop"
        page.click("#send")
        server.left.wait()
        until(page, IDLE)
        assert "Stopped" in page.run("document.querySelector('.note').textContent")
        page.click("[data-mark=again]")
        until(page, f"{IDLE} && ({BODIES})[2] === '答 3 完'")
        page.reload()
        until(page, "connected")
        assert bodies(page) == ["答 1 完", "答 2 完", "答 3 完"]
        ask(page, "谢谢")
    spoken = [
        ("user", "头痛"),
        ("assistant", "答 1 **完**"),
        ("user", "发烧"),
        ("assistant", "答 2 **完**"),
        ("user", "咳嗽"),
        ("assistant", "答 3 **完**"),
        ("user", "谢谢"),
    ]
    found = [told(body) for body in server.asked]
    assert found == [spoken[:1], spoken[:3], spoken[:5], spoken[:5], spoken]
    assert server.asked[0]["stream"] and server.asked[0]["model"] == "sft"
    assert set(page.requests) <= {
        server.address,
        *(f"{server.url}/{path}" for path in ("models", "chat/completions")),
        *(one for one in page.requests if one.startswith("data:")),
    }
    assert page.errors == []


def test_what_was_written_before_a_reload_is_kept_as_a_stopped_answer(page):
    with ScriptedChat(lambda body, index: ["先", HOLD] if not server.left.is_set() else ["好"]) as (
        server
    ):
        enter(page, server)
        ask(page, "头痛", wait=False)
        until(page, f"({BODIES})[0] === '先'")
        page.reload()
        server.left.wait()
        until(page, "connected")
        assert bodies(page) == ["先"] and page.run("document.querySelector('.note').textContent")
        ask(page, "发烧")
    assert told(server.asked[1])[1] == ("assistant", "先")


def test_two_models_are_compared_and_the_preferences_are_read_as_comparisons(page, tmp_path):
    texts = {"sft": "多喝水。", "ppo": "建议胃镜\n\n- 空腹“八”小时\t\\ 😀"}
    with ScriptedChat(
        lambda body, index: [texts[body["model"]] + "！" * index],
        models=("sft", "ppo"),
        reward="reward",
    ) as server:
        page.save_downloads(tmp_path)
        enter(page, server, other="ppo", system="你是医生", language="zh")
        ask(page, "反酸怎么办")
        until(page, "document.querySelectorAll('.score').length === 2")
        tops = page.run("[...document.querySelectorAll('.answer')].map(one => one.offsetTop)")
        assert tops[0] == tops[1]
        titles = page.run("[...document.querySelectorAll('.title')].map(one => one.innerText)")
        assert [title.split("\n")[1] for title in titles] == ["sft", "ppo"]
        scores = [float(len(texts[name])) for name in ("sft", "ppo")]
        assert all(f"{one:.2f}" in title for one, title in zip(scores, titles, strict=True))
        assert page.run("document.querySelector('.score.best').innerText").endswith(
            f"{scores[1]:.2f}"
        )
        assert server.classified[0]["responses"] == list(texts.values())
        assert told(server.classified[0]) == [("system", "你是医生"), ("user", "反酸怎么办")]
        page.run("document.querySelectorAll('.prefer')[1].focus()")
        page.press("Enter")  # The keyboard prefers, and keeps its place.
        assert page.run("document.activeElement.getAttribute('aria-pressed')") == "true"
        assert page.run("at('number').textContent") == "偏好记录 1 条"
        page.run("choose('n', 2); choose('other', null)")
        ask(page, "要禁食吗")  # The conversation goes on from the preferred answer.
        assert told(server.asked[-1])[2] == ("assistant", texts["ppo"])
        assert server.asked[-1]["n"] == 2
        until(page, "document.querySelectorAll('.score').length === 4")
        page.click(".turn:last-child .answer:nth-child(1) .prefer")
        page.click(".turn:last-child .answer:nth-child(2) .prefer")  # Another mind.
        page.reload()
        until(page, "connected")
        assert page.run("document.querySelectorAll('.prefer[aria-pressed=true]').length") == 2
        page.click("#download")
        page.wait_for_download(page.downloads + 1)
        page.click("#forget")
        assert page.run("at('number').textContent") == "偏好记录 0 条"
        page.click("#toast button")
        assert page.run("at('number').textContent") == "偏好记录 2 条"
        page.click(".turn:last-child .answer:nth-child(2) .prefer")  # A second click takes it back.
        assert page.run("at('number').textContent") == "偏好记录 1 条"
    (path,) = tmp_path.glob("preferences-*.jsonl")
    first, second = read_comparisons(path)
    assert [one.content for one in first.messages] == ["你是医生", "反酸怎么办"]
    assert [one.content for one in first.chosen] == [texts["ppo"]]
    assert [one.content for one in first.rejected] == [texts["sft"]]
    assert first.p_chosen == 1.0 and first.margin == scores[1] - scores[0]
    assert first.source == "web_page" and first.extra["chosen_model"] == "ppo"
    assert second.chosen[0].content == texts["sft"] + "！"
    assert len(second.messages) == 4
    assert [one.sampled.ended for one in answers_of(first).answers] == [True, True]
    cfg = ComparisonsConfig(sources=(ComparisonSource(paths=(str(path),)),), max_length=512)
    opened = open_comparisons(cfg, load_tokenizer(tiny.TOKENIZER))
    groups = [*opened.train, *opened.held_out]
    assert sorted(len(one.pairs) for one in groups) == [1, 1]


def test_a_blind_comparison_hides_names_and_scores_until_one_is_preferred(page):
    with ScriptedChat(
        lambda body, index: [f"answer of {body['model']}"],
        models=("sft", "ppo"),
        reward="reward",
    ) as server:
        enter(page, server, other="ppo", blind=True)
        for _ in range(12):  # The order is drawn anew for each question.
            ask(page, "反酸")
            until(page, "!running.size && current.turns.at(-1).answers.every(one => one.score)")
        shown = "[...document.querySelectorAll('.title')].map(one => one.innerText).join()"
        assert not re.search("sft|ppo|Reward", page.run(shown))
        orders = page.run("current.turns.map(one => one.answers.map(a => a.model).join())")
        assert set(orders) == {"sft,ppo", "ppo,sft"}
        page.click(".turn:last-child .prefer")
        last = page.run("document.querySelector('.turn:last-child').innerText")
        assert "sft" in last and "ppo" in last and "Reward" in last
        ((record,),) = page.run("preferences().map(one => one.records)")
    assert record["blind"] is True
    assert record["chosen"] == f"answer of {record['chosen_model']}"


ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=window.hacked=1>",
    "</div></article><svg onload=window.hacked=1><iframe srcdoc='<script>top.hacked=1</script>'>",
    "[click](javascript:window.hacked=1) [out](https://example.com/?secret)",
    "![pixel](https://example.com/pixel.png)",
    "| a | b |\n|---|---|\n| <b onclick=window.hacked=1>x</b> | [y](data:text/html,<script>) |",
    "```html\n<script>window.hacked = 1</script>\n```",
    "`<img src=x onerror=window.hacked=1>`",
    "<style>*{display:none}</style><base href=https://example.com/><meta http-equiv=refresh>",
    "# <a href=https://example.com onmouseover=window.hacked=1>title</a>",
    "> - <form action=https://example.com><button>send</button></form>",
    "__proto__ {{constructor}} ${window.hacked=1} &lt;script&gt; \u202e \ufffd",
]


def test_what_a_model_writes_does_nothing_and_no_other_address_is_asked(page):
    whole = "\n\n".join(ATTACKS)
    hostile = "<img src=x onerror=window.hacked=1>"

    def answer(body, index):
        if body["messages"][-1]["content"] == "fail":
            return ["so far", Fail(hostile)]
        return [whole[place : place + 9] for place in range(0, len(whole), 9)]

    with ScriptedChat(answer, models=(hostile, "b"), reward="reward") as server:
        enter(page, server, other="b")
        ask(page, "".join(ATTACKS))
        until(page, "document.querySelectorAll('.score').length === 2")
        page.click(".prefer")
        ask(page, "fail")
        assert hostile in page.run("document.querySelector('.note.wrong').textContent")
        page.reload()
        until(page, "connected")
        assert page.run("new Promise(go => setTimeout(() => go(window.hacked === undefined), 100))")
        tags = page.run(
            "[...new Set([...document.querySelectorAll('.body *')].map(one => one.tagName))].sort()"
        )
        allowed = page.run("[...ALLOWED].map(one => one.toUpperCase())")
        assert set(tags) <= set(allowed)
        named = page.run(
            "[...document.querySelectorAll('.body *')].flatMap(one => one.getAttributeNames())"
        )
        assert set(named) <= {"class", "tabindex", "start"}
        shown = page.run("document.querySelector('.body').textContent")
        for part in (ATTACKS[0], ATTACKS[1], ATTACKS[2], "(https://example.com/pixel.png)"):
            assert part in shown
        assert page.run("document.querySelector('.bubble').textContent") == "".join(ATTACKS)
        assert all(one.startswith((server.address, "data:")) for one in page.requests)
        assert page.errors == []
        # The page's policy refuses what a text could try, even if it became markup.
        for attempt in (
            "document.body.innerHTML = '<b>x</b>'",
            "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
            "document.createElement('script').text = '1'",
        ):
            refused = page.run(f"(() => {{ try {{ {attempt}; }} catch {{ return true; }} }})()")
            assert refused, attempt
        assert page.run("fetch('http://127.0.0.1:9/').then(() => 0, () => 'refused')") == "refused"
        assert page.run("window.hacked") is None


MARKDOWN = {
    "a **b** c": "<p>a <strong>b</strong> c</p>",
    "**重点：**内容": "<p><strong>重点：</strong>内容</p>",
    "a *b **c***": "<p>a <em>b <strong>c</strong></em></p>",
    "3 * 4 * 5, snake_case_name, 2 ** 3": "<p>3 * 4 * 5, snake_case_name, 2 ** 3</p>",
    "_a_ ~~b~~ \\*c\\*": "<p><em>a</em> <del>b</del> *c*</p>",
    "`a*b*` ``c`d``": "<p><code>a*b*</code> <code>c`d</code></p>",
    "`open": "<p>`open</p>",
    "**open": "<p>**open</p>",
    "a\nb\n\nc<br>d": "<p>a<br>b</p><p>c<br>d</p>",
    "## 标题 ##\ntext": "<h2>标题</h2><p>text</p>",
    "#no heading": "<p>#no heading</p>",
    "1. a\n2. b\n   - c\n   - d\n3. e": (
        "<ol><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li><li><p>d</p></li></ul></li>"
        "<li><p>e</p></li></ol>"
    ),
    "1. a\n\n2. b": "<ol><li><p>a</p></li><li><p>b</p></li></ol>",
    "3) a\n4) b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "- a\n  more\n- b\n\nafter": "<ul><li><p>a<br>more</p></li><li><p>b</p></li></ul><p>after</p>",
    "text\n- a": "<p>text</p><ul><li><p>a</p></li></ul>",
    "* * *": "<hr>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "```py\n1 < 2\n\n```\nx": "<pre><code>1 &lt; 2\n</code></pre><p>x</p>",
    "~~~\nstill written": "<pre><code>still written</code></pre>",
    "|a|b|\n|:-|-|\n|1\\|2|`x`|\n|3|": (
        '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>'
        "<tr><td>1|2</td><td><code>x</code></td></tr><tr><td>3</td><td></td></tr></tbody></table></div>"
    ),
    "a | b": "<p>a | b</p>",
    "[名](http://x.cn/a_(b))": '<p>名<span class="address"> (http://x.cn/a_(b))</span></p>',
    "<b>x</b> & y": "<p>&lt;b&gt;x&lt;/b&gt; &amp; y</p>",
    "\r\na\r\nb": "<p>a<br>b</p>",
    ">" * 40 + "x": "<blockquote>" * 8 + f"<p>{'&gt;' * 32}x</p>" + "</blockquote>" * 8,
}


def test_markdown_becomes_the_elements_that_it_means(page):
    with ScriptedChat(echo) as server:
        enter(page, server)
        found = page.run(
            f"{json.dumps(list(MARKDOWN))}.map(one => {{ const into = element('div', {{}});"
            "renderMarkdown(one, into); return into.innerHTML; })"
        )
        assert dict(zip(MARKDOWN, found, strict=True)) == MARKDOWN
        # Texts that make a careless pattern go on for ever.
        page.run(
            "['`', '*', '[', '#', ' ', '| ', '> ', '- ', '1. ', '~~a', '**a ', '_a ', '\\\\', '![']"
            ".flatMap(one => ['', '# ', '|a|\\n|-|\\n'].map(start => start + one.repeat(8000)))"
            ".forEach(one => renderMarkdown(one, element('div', {})))"
        )


def test_settings_are_sent_remembered_and_restored(page):
    with ScriptedChat(echo, models=("sft", "ppo"), reward="reward") as server:
        enter(page, server)
        assert page.run("document.documentElement.lang") == "en"
        page.click("#language")
        page.click("#theme")
        page.click("#theme")
        background, ink = page.run(BRIGHTNESS)
        assert background < ink  # Dark, where the system is light.
        page.click("#settings")
        page.run("at('system').focus()")
        page.type("你是医生")
        for name, typed in (("temperature", "0.7"), ("top_k", "20"), ("seed", "5"), ("top_p", "7")):
            page.run(f"document.querySelector('[name={name}]').focus()")
            page.type(typed)
        assert page.run("[...document.querySelectorAll('#numbers :invalid')].length") == 1
        page.press("Escape")
        page.run("at('model').value = 'ppo'; at('model').dispatchEvent(new Event('change'))")
        page.reload()
        until(page, "connected")
        assert page.run("document.documentElement.lang") == "zh-CN"
        assert page.run(BRIGHTNESS) == [background, ink]
        ask(page, "头痛")
        page.click("[data-mark=again]")
        while len(server.asked) < 2:  # The page is idle until it has taken the click.
            page.run("new Promise(go => setTimeout(go, 5))")
        until(page, IDLE)
        first, second = server.asked
        assert told(first) == [("system", "你是医生"), ("user", "头痛")]
        assert (first["model"], first["temperature"], first["top_k"]) == ("ppo", 0.7, 20)
        assert (first["seed"], second["seed"]) == (5, 6)  # Another answer, known in advance.
        assert {"top_p", "min_p", "max_tokens", "n"}.isdisjoint(first)
        page.click("#settings")
        page.click("#defaults")
        page.press("Escape")
        ask(page, "发烧")
        assert told(server.asked[-1])[0][0] == "user" and "seed" not in server.asked[-1]
        page.click("#settings")
        page.click("#erase")
        assert stored(page) == "" and bodies(page) == []


def test_a_score_that_comes_after_all_was_erased_brings_nothing_back(page):
    erased = threading.Event()

    def score(response):
        assert erased.wait(60)
        return len(response)

    with ScriptedChat(echo, models=("sft",), reward="reward", score=score) as server:
        enter(page, server)
        page.run("const score = scoreAnswers; scoreAnswers = (...all) => scored = score(...all)")
        ask(page, "头痛")
        page.click("#settings")
        page.click("#erase")
        assert stored(page) == ""
        erased.set()
        page.run("scored.then(() => true)")
        assert stored(page) == "" and bodies(page) == []


def test_a_key_is_asked_for_and_kept_for_the_session_only(page):
    with ScriptedChat(echo, key="sk-secret") as server:
        enter(page, server)
        page.run("at('key').focus()")
        page.type("wrong")
        page.press("Enter")
        until(page, "at('key-dialog').open")
        page.type("sk-secret")
        page.press("Enter")
        until(page, "connected")
        ask(page, "头痛")
        assert bodies(page) == ["第 1 答：多喝水。"]
        page.reload()
        until(page, "connected")
        assert server.keys[0] is None and set(server.keys[-2:]) == {"sk-secret"}
        assert "sk-secret" not in stored(page)


def test_a_failure_says_why_keeps_what_came_and_can_be_tried_again(page):
    faults = {
        "busy": Refuse(429, "full", Retry_After="7"),
        "long": Refuse(400, "the prompt has 9 tokens too many"),
        "odd": Refuse(502, ""),
    }

    def answer(body, index):
        text = body["messages"][-1]["content"]
        if text in faults:
            raise faults.pop(text)
        return {"inside": ["half", Fail("a decode failed")], "cut": ["half", CUT]}.get(text, ["ok"])

    with ScriptedChat(answer) as server:
        enter(page, server)
        note = "document.querySelector('.turn:last-child .note').textContent"
        for text, words in (("busy", "in 7 s"), ("long", "9 tokens too many"), ("odd", "502")):
            ask(page, text)
            assert words in page.run(note)
            page.click("[data-mark=again]")
            until(page, f"{IDLE} && !document.querySelector('.turn:last-child .note')")
        for text, words in (("inside", "a decode failed"), ("cut", "ended before")):
            ask(page, text)
            assert words in page.run(note) and bodies(page)[-1] == "half"
        faults["later"] = Refuse(500, "dead")
        ask(page, "later")
        ask(page, "after")  # A question without an answer is left out.
        assert told(server.asked[-1])[-2:] == [("assistant", "half"), ("user", "after")]
    page.errors.clear()  # The browser lists each refusal; now there is no server at all.
    ask(page, "gone")
    assert "connection" in page.run(note)
    page.run("findModels()")
    assert "Cannot reach" in page.run("at('banner').innerText")


def test_conversations_are_listed_edited_removed_exported_and_answered_in_the_background(
    page, tmp_path
):
    def answer(body, index):
        held = body["messages"][-1]["content"] == "slow"
        return ["begun ", HOLD, "done"] if held else echo(body, index)

    with ScriptedChat(answer) as server:
        page.save_downloads(tmp_path)
        enter(page, server)
        ask(page, "slow", wait=False)
        until(page, f"({BODIES})[0] === 'begun'")
        page.click("#new")
        ask(page, "头痛")
        ask(page, "发烧")
        page.click("[data-mark^=edit]")
        page.run("at('text').select()")
        ask(page, "牙痛 **x**")  # Replaces the question and what followed.
        assert told(server.asked[-1]) == [("user", "牙痛 **x**")]
        assert page.run("document.querySelectorAll('.dot').length") == 1
        server.released.set()
        until(page, "!running.size")
        names = page.run("[...document.querySelectorAll('.pick')].map(one => one.textContent)")
        assert sorted(names) == ["slow", "牙痛 **x**"]
        page.click(".pick[title=slow]")
        assert bodies(page) == ["begun done"]
        page.click(".open [data-mark^=bin]")
        assert page.run("[document.querySelectorAll('.pick').length, at('empty').hidden]") == [
            1,
            False,
        ]
        page.click("#toast button")
        assert bodies(page) == ["begun done"]
        page.click(".pick[title^=牙痛]")
        for number, form in enumerate(("lines", "markdown"), start=page.downloads + 1):
            page.click("#export")
            page.click(f"#as-{form}")
            page.wait_for_download(number)
        # What an input method ends with Enter is not sent.
        page.run(
            "at('text').value = 'wo'; at('text').dispatchEvent(new KeyboardEvent('keydown',"
            "{key: 'Enter', isComposing: true}))"
        )
        assert page.run("at('text').value") == "wo" and len(server.asked) == 4
    (lines,), (markdown,) = tmp_path.glob("*.jsonl"), tmp_path.glob("*.md")
    (dialogue,) = read_dialogues(lines)
    assert [one.content for one in dialogue.messages] == ["牙痛 **x**", "第 1 答：**多喝水**。"]
    text = markdown.read_text(encoding="utf-8")
    assert "第 1 答：**多喝水**。" in text and "no medical advice" in text and "sft" in text


def test_the_page_fits_phone_and_desktop_in_both_colour_schemes_and_languages(page, tmp_path):
    long = "| 药物 | 用法 | 注意 |\n|-|-|-|\n" + "| 奥美拉唑肠溶胶囊 | 每日一次 | 餐前 |\n" * 9
    with ScriptedChat(
        lambda body, index: [long, "x" * 300], models=("sft", "a-long-name-of-a-model"), reward="r"
    ) as server:
        page.open(server.address)
        for width, dark, language in (
            (390, False, "zh"),
            (390, True, "en"),
            (1280, False, "en"),
            (1280, True, "zh"),
        ):
            page.size(width, 844 if width == 390 else 800, mobile=width == 390, dark=dark)
            enter(page, server, language=language, other=None)
            for view in ("empty", "one", "several", "settings"):
                if view == "one":
                    page.run("at('new').click(); send('反酸')")
                elif view == "several":
                    page.run("choose('other', 'a-long-name-of-a-model'); send('反酸')")
                elif view == "settings":
                    page.run("at('settings').click()")
                else:
                    page.run("at('new').click()")
                until(page, f"{IDLE} && !running.size")
                assert page.run("document.documentElement.scrollWidth") == width, view
                background, ink = page.run(BRIGHTNESS)
                assert (background < ink) == dark
                for wrong in (CUT_LABELS, NAMELESS, FAINT):
                    assert page.run(wrong) == [], view
                advice = "医疗建议" if language == "zh" else "no medical advice"
                assert advice in page.run("at('advice').innerText")
            page.press("Escape")
        for _ in range(12):  # By the keyboard alone; where the focus is can be seen.
            page.press("Tab")
            assert page.run(
                "document.activeElement === document.body"
                " || getComputedStyle(document.activeElement).outlineStyle === 'solid'"
                " || document.activeElement.id === 'text'"
            )
        page.size(390, 844, mobile=True)
        page.run("at('menu').click()")
        assert page.run("[at('side').checkVisibility(), document.activeElement.id]") == [
            True,
            "new",
        ]
        page.press("Escape")
        assert page.run("document.activeElement.id") == "menu"


def test_the_policy_names_the_hashes_of_the_style_and_the_script():
    content = PAGE.read_text(encoding="utf-8")
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', content)
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy, f"the hash of the {tag} is {digest}"
    assert "innerHTML" not in content and "default-src 'none'" in policy
