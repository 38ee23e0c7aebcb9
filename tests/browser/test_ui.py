"""A person in front of a browser: fills the form, watches the build, reads its card, looks into the bucket,
and switches the weekly schedule on and off."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import expect

from cascade.recipe_files import load_recipe
from tests.browser.conftest import HEIGHT, PATIENCE_SECONDS, WIDTH, Screen
from tests.e2e.test_up import up
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

LONG = 1000 * PATIENCE_SECONDS
BUILD_LONG = 5 * LONG
TOKENS = 7168
ATTEMPTS = 10
# Down to its lineage.
CARD_HEIGHT = 1440
expect.set_options(timeout=LONG)


class Ui:
    """Prefect's pages, and its API to see what became of a click."""

    def __init__(self, screen: Screen, address: str) -> None:
        self.screen, self.page, self.address = screen, screen.page, address

    def api(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """The answer to a request."""
        data = None if content is None else json.dumps(content).encode()
        request = Request(f"{self.address}/api/{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return json.load(answer)

    def open_deployment(self, name: str) -> dict[str, Any]:
        """Go to the page of a deployment, as a person does; its record."""
        self.page.goto(self.address)
        self.page.get_by_role("link", name="Deployments", exact=True).click()
        self.page.get_by_role("link", name=name, exact=True).first.click()
        expect(self.page.get_by_role("button", name="Run", exact=True)).to_be_visible()
        found: dict[str, Any] = self.api(f"deployments/name/build-family/{name}")
        return found

    def require_field(self, label: str, description: str, value: str, nth: int = 0) -> None:
        """A field has its title, its description and its value."""
        field = self.page.get_by_label(label, exact=True).nth(nth)
        expect(field).to_have_value(value)
        expect(self.page.get_by_text(description, exact=True).nth(nth)).to_be_visible()

    def require_schedule(self, deployment: str, active: bool) -> None:
        """The server has heard of the switch, and plans runs, or none."""
        path, asked = f"deployments/{deployment}/schedules", {"deployment_ids": [deployment]}
        assert wait_until(lambda: [one["active"] for one in self.api(path)] == [active], PATIENCE_SECONDS)
        planned = "deployments/get_scheduled_flow_runs"
        assert wait_until(lambda: bool(self.api(planned, asked)) == active, PATIENCE_SECONDS)


def test_a_family_is_built_and_inspected_in_a_browser(screen: Screen, tmp_path: Path) -> None:
    with up(tmp_path) as stack:
        ui = Ui(screen, stack.said["Prefect UI"])
        fill_the_form(ui)
        trigger(ui)
        read_the_card(ui)
        browse_the_bucket(ui, stack.said["bucket browser"])
        toggle_the_schedule(ui)


def fill_the_form(ui: Ui) -> None:
    """Its fields are titled, described and filled in with the recipe; one of them is changed."""
    page = ui.page
    ui.open_deployment("smoke")
    ui.screen.shot("deployment")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    smoke = load_recipe("smoke")
    ui.require_field("Family", "Lowercase letters, digits and dashes; names the folder.", smoke.family)
    parents = "A hub id, a Hugging Face folder, a .gguf file, an s3:// folder or an artifact."
    ui.require_field("Parent", parents, smoke.parent)
    ui.require_field("Sequence length (Optional)", "Tokens in a packed sequence.", "64")
    for number, stage in enumerate(smoke.stages):
        tokens, described = str(stage.distill.tokens), "Training tokens, rounded up to whole sequences."
        ui.require_field("Tokens", described, tokens, number)
    ui.screen.shot("form")
    ui.screen.shot("form-whole", whole=True)
    changed = page.get_by_label("Tokens", exact=True).first
    changed.fill(str(TOKENS))
    changed.scroll_into_view_if_needed()
    ui.screen.shot("form-changed")


def trigger(ui: Ui) -> None:
    """Submit the form and watch the run to its end; it had just what the form showed."""
    page, run = ui.page, submit(ui)
    page.goto(re.sub("/deployments/.*", f"/runs/flow-run/{run}", page.url))
    expect(page.get_by_text("Running", exact=True).first).to_be_visible(timeout=BUILD_LONG)
    expect(page.get_by_text(re.compile(r"stored [0-9.]+ MB")).first).to_be_visible(timeout=BUILD_LONG)
    ui.screen.shot("running")
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=BUILD_LONG)
    ui.screen.shot("completed")
    found = ui.api(f"flow_runs/{run}")
    assert found["state_type"] == "COMPLETED"
    expected = load_recipe("smoke").model_dump(mode="json")
    expected["stages"][0]["distill"]["tokens"] = TOKENS
    assert found["parameters"]["recipe"] == expected


def submit(ui: Ui) -> str:
    """Press the button; the id of the run. Again where SQLite was busy: the page says "unknown error".

    It shows a link to the run for four seconds only, which a busy machine may miss.
    """
    for _ in range(ATTEMPTS):
        with ui.page.expect_response(re.compile("/create_flow_run$")) as answer:
            ui.page.get_by_role("button", name="Submit").click()
        if answer.value.ok:
            return str(answer.value.json()["id"])
    pytest.fail(f"the form was refused {ATTEMPTS} times")


def read_the_card(ui: Ui) -> None:
    """The run's artifacts lead to the family's card, with its picture and its lineage drawn."""
    page = ui.page
    page.get_by_role("tab", name="Artifacts").click()
    ui.screen.shot("artifacts")
    page.get_by_role("link", name="smoke-family").first.click()
    # Its versions, the newest first.
    page.get_by_role("link", name=re.compile(r"^[0-9a-f]{8}$")).first.click()
    expect(page.get_by_role("heading", name="Family smoke")).to_be_visible()
    picture = page.get_by_role("img", name="Size and quality")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 100")
    expect(page.locator("svg[id^=mermaid]")).to_contain_text("small distilled")
    page.set_viewport_size({"width": WIDTH, "height": CARD_HEIGHT})
    ui.screen.shot("card")
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def browse_the_bucket(ui: Ui, browser: str) -> None:
    """What the card names is there to be seen."""
    page = ui.page
    page.goto(browser)
    for folder in ("families", "smoke", "small", "distilled"):
        page.get_by_role("link", name=folder, exact=True).click()
    page.get_by_role("link", name=re.compile(r"^[0-9a-f]{12}$")).first.click()
    expect(page.get_by_text("manifest.json").first).to_be_visible()
    expect(page.get_by_text("model.safetensors").first).to_be_visible()
    ui.screen.shot("bucket")


def toggle_the_schedule(ui: Ui) -> None:
    """Off until somebody switches it on, and off again."""
    deployment = ui.open_deployment("build-family-weekly")
    switch = ui.page.get_by_role("switch").first
    expect(switch).to_be_checked(checked=False)
    for active in (True, False):
        switch.click()
        expect(switch).to_be_checked(checked=active)
        ui.require_schedule(deployment["id"], active)
        ui.screen.shot(f"schedule-{'on' if active else 'off'}")
