"""Free-text radiology reports: sections, sentences, clean-up."""

import re


def sections(text: str) -> dict[str, str]:
    return {}


def clean(text: str) -> str:
    return " ".join(text.split())


def token_count(text: str) -> int:
    return len(re.findall(r"\w+", text))


def select_text(findings: str, impression: str, report: str, sections: tuple[str, ...]) -> str:
    chosen = {"findings": findings, "impression": impression}
    return " ".join(filter(None, (chosen[name] for name in sections))) or clean(report)
