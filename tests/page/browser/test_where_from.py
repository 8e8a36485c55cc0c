"""A click on a number in the browser: where it comes from, followed and back again."""

import re

from playwright.sync_api import expect
from tests.page.browser.places import across, part, unfold

import everystep


def test_a_click_on_a_number_says_where_it_comes_from(visit, recorded):
    page = visit("/runs/chapter?step=137")
    panel = unfold(part(page, "Backward"), "2.weight.grad").locator(".panel")
    heat = panel.locator(".heat-map canvas[role=img]")
    expect(heat).to_have_attribute("aria-label", re.compile("^Heat map"))
    place = across(heat, 0.42)
    page.mouse.move(*place)
    said = panel.locator(".heat-map .readout").inner_text()
    row, column = (int(each) for each in re.findall(r"\d+", said)[:2])
    page.mouse.click(*place)
    reasons = panel.locator(".reasons")
    answer = everystep.open(recorded / "chapter").why(137, f"gradients['2.weight'][{row}, {column}]")
    expect(reasons.locator(".reason-of")).to_contain_text(f"{answer.number.name} = ")
    expect(reasons.locator(".terms tr")).to_have_count(9)
    factor = answer.groups[0].terms[0].numbers["self"]
    reasons.get_by_role("button", name=factor.name, exact=True).first.click()
    expect(reasons.locator(".reason-of")).to_contain_text(f"{factor.name} = ")
    reasons.locator(".trail button").click()
    expect(reasons.locator(".reason-of")).to_contain_text(f"{answer.number.name} = ")
