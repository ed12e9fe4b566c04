"""The page on the API: its examples are sent as they stand there, and its routes are there."""

import base64
import json
import re
from pathlib import Path

import pytest
from standin import picture

pytest_plugins = "serving"

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
BLOCKS = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
CALLS = re.findall(r"^curl -s (?:-X (\w+) )?localhost:7860(\S+)((?:.|\n  )*)$", BLOCKS, re.MULTILINE)


def test_there_are_examples_of_each_api():
    assert len(CALLS) > 12
    assert {path.split("/")[1] for _, path, _ in CALLS} == {"sdapi", "controlnet", "v1"}


@pytest.mark.parametrize("call", CALLS, ids=[call[1] for call in CALLS])
def test_an_example_is_answered(client, call):
    method, path, rest = call
    more = {}
    if data := re.search(r"-d '((?:.|\n)*)'$", rest):
        more["json"] = json.loads(data[1].replace("""'"$HINT"'""", picture()))
    elif fields := re.findall(r'-F (\w+)="?([^ "@]*(?: [^ "@-]+)*)"?', rest):
        more["data"] = {key: value for key, value in fields if value}
        more["files"] = {
            key: (name, base64.b64decode(picture(alpha=0)), "image/png")
            for key, name in re.findall(r"-F (\w+)=@(\S+)", rest)
        }
    answer = client.request(method or ("POST" if more else "GET"), path, **more)
    assert answer.status_code in (200, 202), answer.text


def test_every_route_that_the_page_names_is_there(client):
    there = {re.sub(r"\{\w+\}", "X", path) for path in client.get("/openapi.json").json()["paths"]}
    named = set(re.findall(r"`?((?:/v1|/sdapi|/controlnet)/[\w/\-]+)", PAGE)) - {"/v1/images", "/sdapi/v1"}
    assert {re.sub(r"/(ID|NAME)\b", "/X", path) for path in named if path.count("/") > 1} <= there
