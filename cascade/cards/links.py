"""Where things lie, as a person can copy or open it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from urllib.parse import quote

from cascade.cards.markdown import code

BROWSER = "CASCADE_BROWSER_URL"
RECIPE = "recipe.yaml"
S3 = "s3://"


@dataclass(frozen=True)
class Links:
    """store: the root that all lies under. browser: the pattern of a bucket browser's addresses, such as
    `http://127.0.0.1:8888/buckets/{bucket}/{prefix}`; empty without one."""

    store: str
    browser: str = ""

    def family(self, name: str) -> str:
        """The folder of a family."""
        return f"{self.store.rstrip('/')}/{name}"

    def place(self, uri: str) -> str:
        """A place as code, and as a link where a browser shows it."""
        address = self.address(uri)
        return code(uri) + (f" ([browse]({address}))" if address else "")

    def address(self, uri: str) -> str:
        """Where a browser shows it; empty if none does."""
        if not self.browser or not uri.startswith(S3):
            return ""
        bucket, _, prefix = uri[len(S3) :].partition("/")
        filled = self.browser.replace("{bucket}", quote(bucket, safe="")).replace("{prefix}", quote(prefix))
        return filled.replace("(", "%28").replace(")", "%29").replace(" ", "%20")

    def build(self, family: str) -> str:
        """The command that makes the family again, or goes on with it."""
        recipe = f"{self.family(family)}/{RECIPE}"
        return f"cascade build {shlex.quote(recipe)} --store {shlex.quote(self.store)}"
