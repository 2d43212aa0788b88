"""The rules by which released evaluators read replies, written anew to show where they fail.

Each takes a reply, the options and whether several may be right, and gives the letters that it
scores.
"""

import difflib
import re


def cmb(reply, options, several):
    """`match_choice` and `extract_ans` of FreedomIntelligence/CMB: the first 答案是, else all."""
    stated = re.search(
        "(?:答案|正确选项)(?:是|：|为|应该是|应该为)(.*?)(?:。|[.]|$)", reply, re.DOTALL
    )
    letters = "".join(re.findall("[A-G]", stated.group(1) if stated else reply))
    return letters if several else letters[:1]


def huatuogpt2(reply, options, several):
    """`match_choice3` of HuatuoGPT-II: ascending letters, option texts, a run; else B."""
    stated = re.search("答案(?:是|为)(.*?)(?:。|$)", reply, re.DOTALL)
    letters = ""
    for letter in re.findall("[A-E]", stated.group(1)) if stated else ():
        if not letters or letter > letters[-1]:
            letters += letter
    if not letters:
        placed = sorted((reply.find(text), label) for label, text in options.items())
        spelled = "".join(label for place, label in placed if place >= 0)
        runs = re.findall("(?<![A-Za-z])[A-E]+(?![A-Za-z])", reply)
        ascending = [run for run in runs if list(run) == sorted(set(run))]
        if spelled and list(spelled) == sorted(spelled):
            letters = spelled
        else:
            letters = ascending[0] if ascending else spelled
    letters = letters or "B"
    return letters if several else letters[0]


def huatuogpt_o1(reply, options, several):
    """`match_choice` of HuatuoGPT-o1: the first and the last find; never none."""
    reply = reply.split("## Final Response\n\n")[-1]
    found = re.findall(r"answer is\s*?([A-N])", reply)
    if not found:
        labels = "".join(options)
        around = r"(?:[\u4e00-\u9fff]|is |\W|^)"
        found = re.findall(
            rf"{around}(?![aA] )([{labels}])(?=\W|[\u4e00-\u9fff]|$)", reply, re.DOTALL
        )
    if not found:
        lowered = {label: text.lower() for label, text in options.items()}
        placed = sorted(
            (reply.lower().rindex(text), label)
            for label, text in lowered.items()
            if text in reply.lower()
        )
        _, similar = max(
            (difflib.SequenceMatcher(None, text, reply).ratio(), label)
            for label, text in lowered.items()
        )
        found = [label for _, label in placed[-1:]] or [similar]
    return found[0] if found[0] == found[-1] else f"{found[0]} or {found[-1]}"


def opencompass_multiple(reply, options, several):
    """`multiple_select_postprocess`: all capital letters."""
    return "".join(sorted({letter for letter in reply if letter.isupper()}))


def opencompass_first(reply, options, several):
    """`first_option_postprocess`: the first of a list of patterns that is found anywhere."""
    labels = "".join(options)
    patterns = (
        rf"答案(?:是|应该?是|应该?选|为|选)?\s?[:：]?([{labels}])",
        rf"选择?\s?([{labels}])",
        rf"([{labels}])\s?是正确",
        rf"选项\s?([{labels}])\s?正确",
        rf"[\s，：:,。是为](?:因此|所以|故)?([{labels}])[。，,.]?$",
        rf"[Tt]he (?:correct )?answer is (?:option )?([{labels}])",
        rf"(?:\s|^)([{labels}])(?:[\s。，,：:.]|$)",
        rf"([{labels}])",
    )
    found = (re.search(pattern, reply) for pattern in patterns)
    return next((match.group(1) for match in found if match), "")


def cmexam(reply, options, several):
    """`parse_options` of CMExam: every option whose letter or text is anywhere in the reply."""
    return "".join(
        label for label, text in options.items() if label in reply or text.split()[0] in reply
    )


EXTRACTORS = (cmb, huatuogpt2, huatuogpt_o1, opencompass_multiple, opencompass_first, cmexam)
