"""Secrets are shown nowhere: by type, by what was read, and by where they stand in texts of other people."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from policies import redaction
from policies.engine import ConfigError, EngineProfile, StrictModel, parse_model
from policies.redaction import KEPT, LONGEST, guard_streams, in_short, redacted, remember, scrubbed, shown
from policies.secret_url import REVEALED, HttpUrl, Url
from policies.spec import find_engine, shipped_configs

HIDDEN = "hunter2-sentinel"


class Settings(StrictModel):
    url: Url
    password_file: str = ""


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql+psycopg://me:{HIDDEN}@db/x",
        f"postgresql://me:p@ss/{HIDDEN}@db/x",
        f"mysql://{HIDDEN[:3]}:{HIDDEN}@[::1]:3306/x",
        f"https://{HIDDEN}@registry/models",
        f"http://h/?access_token={HIDDEN}&x=1",
        f"Max retries exceeded with url: /api/v1/query?query=up&token={HIDDEN}",
        f"password={HIDDEN} host=db",
        f"'password': '{HIDDEN}'",
        f'{{"api_key": "{HIDDEN}"}}',
        f"Authorization: Bearer {HIDDEN}",
        f"{{'Authorization': 'Basic {HIDDEN}'}}",
        f"got header Bearer {HIDDEN}",
        f"X-Auth-Token: {HIDDEN}",
        f"Set-Cookie: {HIDDEN}",
        f"Cookie: theme=dark; session={HIDDEN}",
        f'{{"access_token": "{HIDDEN}", "expires_in": 3600}}',
    ],
)
def test_what_stands_where_secrets_stand_is_hidden(text: str) -> None:
    assert HIDDEN not in redacted(text)
    assert HIDDEN not in shown(text)
    assert "***" in redacted(redacted(text))


@pytest.mark.parametrize("password", ["Tr0ub4dor&3x!", "a+b/c d'e\"<f>", "pässwörd?%zz", "1234567890abcdef"])
def test_a_secret_is_hidden_however_others_spell_it(password: str) -> None:
    remember(password)
    percent = quote(password, safe="")
    spellings = {
        password,
        percent,
        quote(password),
        quote_plus(password),
        re.sub("%..", lambda it: it[0].lower(), percent),
    }
    spellings |= {password.lower(), password.upper(), percent.lower()}
    spellings |= {html.escape(password), html.escape(password, quote=False), json.dumps(password)[1:-1]}
    spellings |= {html.escape(password).replace("&quot;", "&#34;").replace("&#x27;", "&#39;").replace("+", "&#43;")}
    spellings |= {repr(password.encode())[2:-1]}
    for spelling in spellings:
        assert redacted(f"seen: {spelling} there") == "seen: *** there"


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("before", ["", "me:", "user:", "admin:", "{'name': 'x', 'password': "])
@pytest.mark.parametrize("after", ["", "\n", "'}"])
def test_a_secret_within_base64_is_hidden(encode: Callable[[bytes], bytes], before: str, after: str) -> None:
    password = "Tr0ub4dor&3x!?>~~~"
    remember(password)
    shown_text = redacted(f"seen: {encode(f'{before}{password}{after}'.encode()).decode()} there")
    assert "***" in shown_text
    hidden = base64.b64encode(password.encode()).decode()
    assert not any(hidden[at : at + 4] in shown_text for at in range(len(hidden) - 4))
    left = shown_text.removeprefix("seen: ").removesuffix(" there").replace("***", "")
    assert len(left) <= len(encode(f"{before}{after}".encode())) + 4  # the letters that the secret shares with others


@pytest.mark.parametrize(
    "text",
    [
        "http://prometheus:9090: HTTP 503: no answer",
        "sqlite:////data/a@b.db",
        "postgresql://me:${PASSWORD}@db/x",
        '{"fencing_token": 5, "tokens": 1000, "max_num_batched_tokens": 8}',
        "username needs password_env or password_file, and they need username",
        "Basic authentication is needed",
        "refused the token; set token_file",
        "bearer_token_file: /run/secrets/token",
        "models:/jevons-policy@champion",
    ],
)
def test_ordinary_sentences_stay_what_they_are(text: str) -> None:
    assert redacted(text) == text


def test_a_secret_that_was_read_is_hidden_wherever_it_stands() -> None:
    assert Url("postgresql://me:${PW}@db/x").reveal({"PW": "pl ain/word-99"}) == "postgresql://me:pl ain/word-99@db/x"
    assert redacted("the server says pl ain/word-99, or pl%20ain%2Fword-99") == "the server says ***, or ***"
    remember("short")
    Url("http://${TRACKING_HOST}:9090/?access=${X}&token=${Y}").reveal(
        {"TRACKING_HOST": "grafana", "X": "r", "Y": "t9-cat"}
    )
    Url("postgresql://${PGUSER}:${PGPASSWORD}@db/${PGDATABASE}").reveal(
        {"PGUSER": "scaler", "PGPASSWORD": "pg-se7en", "PGDATABASE": "decisions"}
    )
    Url("postgresql://autoscaler:autoscaler@localhost/x").reveal({})
    ordinary = "grafana, scaler, autoscaler and decisions are ordinary words"
    assert redacted(f"{ordinary}, t9-cat and pg-se7en are not") == f"{ordinary}, *** and *** are not"
    assert redacted("postgresql://autoscaler:autoscaler@localhost/x") == "postgresql://autoscaler:***@localhost/x"
    assert redacted("a short text") == "a short text"


def test_secrets_that_are_replaced_again_and_again_do_not_pile_up() -> None:
    """The present one and those before it stay hidden, and so do those of other places, however old they are."""
    remember("of-the-database")
    remember("of-another-file", "/other")
    size, files = [], [f"token-{number:04d}-of-a-file" for number in range(200)]
    for token in files:
        remember(token, "/file")
        remember(token, "/file")  # as at each tick
        size.append(len(redaction._forms))
    assert max(size[KEPT:]) == size[KEPT]
    hidden = [*files[-KEPT:], "of-the-database", "of-another-file"]
    assert redacted(" ".join(hidden)) == " ".join(["***"] * len(hidden))
    remember(files[-KEPT], "/file")  # back to the oldest: it is the newest now
    remember("token-of-tomorrow", "/file")
    assert redacted(f"{files[-KEPT]} {files[-1]}") == "*** ***"


def test_a_url_shows_its_password_in_no_form_but_the_one_that_asks_for_it() -> None:
    settings = Settings(url=f"http://me:{HIDDEN}@host")
    forms = [
        str(settings),
        repr(settings),
        f"{settings.url} {settings.url!r}",
        "%s" % settings.url,  # noqa: UP031 - as loggers do
        settings.model_dump_json(),
        json.dumps(settings.model_dump(mode="json")),
        str(settings.model_dump()),
    ]
    assert [form for form in forms if HIDDEN in form] == []
    assert settings.url.reveal({}) == f"http://me:{HIDDEN}@host"
    assert Settings.model_validate_json(settings.model_dump_json(context=REVEALED)) == settings
    assert str(Url(f"me:{HIDDEN}@host")) == "me:***@host"
    plain = Settings(url="http://host:9090/x")
    assert Settings.model_validate_json(plain.model_dump_json()) == plain


@pytest.mark.parametrize("password", ["it's-9", 'quo"te-9', "<tag>-9", "back\\slash-9", "a blank-9", "a@b:c/d?e-9"])
def test_a_password_may_hold_what_ends_a_url_in_a_sentence(password: str) -> None:
    url = Url(f"postgresql://me:{password}@db/x")
    assert str(url) == "postgresql://me:***@db/x"
    with pytest.raises(ConfigError) as found:
        parse_model({"url": "x", "where": f"s3://me:{password}@db/x"}, Settings, "live.yaml")
    assert str(found.value).endswith("got 's3://me:***@db/x'")
    url.reveal({})
    told = f"{[password]} {json.dumps(password)} {password}"
    assert password not in redacted(told)
    assert repr(password)[1:-1] not in redacted(told)


def test_a_wrong_configuration_is_refused_without_its_secrets() -> None:
    for data in (
        {"url": f"me:{HIDDEN}", "password": HIDDEN},
        {"url": ["x"], "password_file": f"//a:{HIDDEN}@b"},
        {"url": f"x://a:{HIDDEN}@b\n"},
        {"url": "x", "password_file": [HIDDEN]},
    ):
        with pytest.raises(ConfigError) as found:
            parse_model(data, Settings, "live.yaml")
        assert HIDDEN not in str(found.value)
    with pytest.raises(ValueError, match="begins with http"):
        TypeAdapter(HttpUrl).validate_python("ftp://host")


@pytest.mark.parametrize(
    "field", ["kv_capacity_tokens", "step.b_us_per_prefill_token", "step.e_ns_per_prefill_token2", "max_num_seqs"]
)
def test_a_wrong_number_of_tokens_is_repeated(field: str) -> None:
    data = find_engine("llama-3.1-8b-l40s", shipped_configs()).model_dump(mode="json")
    part, _, name = field.rpartition(".")
    (data[part] if part else data)[name] = -5
    with pytest.raises(ConfigError, match=f"field {field}: .*, got -5"):
        parse_model(data, EngineProfile, "engine.yaml")


def test_texts_of_other_people_take_no_control_of_a_terminal() -> None:
    assert shown("pod \x1b]0;owned\x07 \x9b2J\nok: all is well\u202e") == (
        "pod \\x1b]0;owned\\x07 \\x9b2J\\nok: all is well\\u202e"
    )


def test_streams_are_guarded_tracebacks_included(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    guard_streams()
    print(f"http://me:{HIDDEN}@host")
    try:
        raise RuntimeError(f"password={HIDDEN}")
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    sys.stdout.writelines([f"Authorization: Bearer {HIDDEN}\n"])
    assert out.getvalue() == "http://me:***@host\nAuthorization: Bearer ***\n"
    assert HIDDEN not in err.getvalue()
    assert "password=***" in err.getvalue()
    assert not sys.stdout.isatty()


@given(st.text(alphabet="abc:/@ =\"'?&\\{}$*", max_size=40))
def test_redaction_never_breaks_json_and_settles_at_once(text: str) -> None:
    assert json.loads(redacted(json.dumps({"password": text, "url": f"http://{text}"}))) is not None
    assert scrubbed({"a": [text]}) == {"a": [redacted(text)]}
    assert redacted(redacted(text)) == redacted(text)


HOSTILE = (
    "a-",
    "a.",
    "x-",
    "x-token",
    "?a",
    "?token",
    "a://",
    "a://b:",
    "http://",
    "password",
    "Bearer ",
    "authorization:",
)


@pytest.mark.timeout(60)  # seconds where the time grows with the length, hours where it grows with its square
@pytest.mark.parametrize("part", HOSTILE)
def test_megabytes_of_others_are_redacted_in_the_time_that_their_length_takes(part: str) -> None:
    text = part * (1_000_000 // len(part))
    assert HIDDEN not in redacted(f"{text} password={HIDDEN}")


def test_a_sentence_that_quotes_others_is_cut_and_no_secret_in_two() -> None:
    assert in_short("chat is scraped twice") == "chat is scraped twice"
    remember(HIDDEN)
    cut = in_short(f"{'x' * (LONGEST - 8)}{HIDDEN}{'y' * 1_000_000}")
    assert len(cut) == LONGEST
    assert HIDDEN[:6] not in cut
