"""Cleaning of each kind of corpus on texts made here: what goes, and what must stay."""

import csv
import email.message
import json
import sys
import types

import pytest

from almostgpt.config import DataConfig
from almostgpt.data.corpora import CORPORA, read_documents
from almostgpt.errors import UserError


def read(path, corpus, **settings):
    documents = read_documents(DataConfig(path=str(path), corpus=corpus, **settings), None)
    return [document.text for document in documents]


def clean(corpus, text):
    return CORPORA[corpus].clean(text)


# ---------------------------------------------------------------- books

BOOK = "THE TITLE\n\nCHAPTER I\n\nIt began. *** And so on.\n\nTHE END"


@pytest.mark.parametrize(
    "framed",
    [
        "The Project Gutenberg EBook\n\n*** START OF THIS PROJECT GUTENBERG EBOOK TITLE ***\n\n{}\n\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK TITLE ***\n\nlicence",
        "\ufeffx\r\n***START OF THE PROJECT GUTENBERG EBOOK A LONG\r\nTITLE, WITH A * IN IT***\r\n{}\r\n"
        "***END OF THE PROJECT GUTENBERG EBOOK A LONG TITLE***\r\n",
        "small\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n\n{}\n\n"
        "End of the Project Gutenberg EBook of Title, by Somebody\n",
        "*** START OF THE PROJECT GUTENBERG EBOOK T ***\nProduced by A. Body and the\nProofreading Team"
        "\n\n\n\n{}\n\nEnd of Project Gutenberg's Title\n*** END OF THE PROJECT GUTENBERG EBOOK T ***",
        "{}",
        "{}\n\n*** END OF THE PROJECT GUTENBERG EBOOK TITLE ***\n",
    ],
)
def test_gutenberg(framed):
    assert clean("gutenberg", framed.format(BOOK)) == BOOK


def test_gutenberg_columns(tmp_path):
    for column in ("TEXT", "text"):
        file = tmp_path / "a.jsonl"
        file.write_text(json.dumps({"id": 1, column: f"\n{BOOK}\n"}) + "\n")
        assert read(file, "gutenberg") == [BOOK]


# ---------------------------------------------------------------- news


@pytest.mark.parametrize(
    "before",
    [
        "",
        "(CNN)",
        "(CNN) -- ",
        "LONDON, England (Reuters) -- ",
        "Tokyo (CNN)",
        "By . Daily Mail Reporter . ",
        "By . A. Body . and B. Other . PUBLISHED: . 14:11 EST, 25 October 2013 . | . UPDATED: . "
        "15:36 EST, 25 October 2013 . ",
        "By . Associated Press . PUBLISHED: . 14:11 EST, 25 October 2013 . ",
    ],
)
def test_cnn(before):
    text = "Police (in Japan) say that they (CNN) have arrested a man. By . the way."
    assert clean("cnn", before.replace("A. Body", "Abe Body").replace("B. O", "O") + text) == text


@pytest.mark.parametrize(
    "text",
    [
        "Shares (of Apple) -- and others -- fell.",
        "A man (Bob) said so.",
        "(Sic) transit.",
        "(a)",
        "",
    ],
)
def test_cnn_keeps_brackets_of_the_text(text):
    assert clean("cnn", text) == text


# ---------------------------------------------------------------- mails

OWN = "Hi Bob,\n\nlunch at 12:00?\n\nAnn"
REPLIES = [
    " -----Original Message-----\nFrom: Bob\nSent: Monday\nTo: Ann\nSubject: Lunch\n\nWhen?",
    "---------------------- Forwarded by Ann/HOU/ECT on 05/14/2001 09:12 AM ----------\n\nold",
    "On Mon, 14 May 2001, Bob Smith <bob@enron.com> wrote:\nold",
    "On Mon, May 14, 2001 at 10:00 AM, Bob Smith <\nbob@enron.com> wrote:\nold",
    "Bob Smith@ENRON\n05/14/2001 09:12 AM\nTo: Ann/HOU/ECT@ECT\ncc:  \nSubject: Lunch\n\nold",
    "From: Bob\nSent: Monday\nTo: Ann\nSubject: Lunch\n\nold",
    "> When do we meet?\n> Bob",
    "",
]
HEADERS = (
    "Message-ID: <18782981.1075855378110.JavaMail.evans@thyme>\r\nDate: Mon, 14 May 2001 16:39:00 "
    "-0700 (PDT)\r\nFrom: ann@enron.com\r\nTo: bob@enron.com\r\nSubject: \r\nMime-Version: 1.0\r\n"
    "Content-Type: text/plain; charset=us-ascii\r\nContent-Transfer-Encoding: 7bit\r\nX-Folder: "
    "\\Ann_Allen_Jan2002_1\\Allen, Ann\\'Sent Mail\r\nX-FileName: pallen.nsf\r\n\r\n"
)


@pytest.mark.parametrize("reply", REPLIES)
def test_enron_replies(reply):
    assert clean("enron", f"{OWN}\n\n{reply}\n") == OWN


def test_enron_keeps_what_only_looks_like_a_reply():
    text = "On Monday he wrote:\nFrom: here to there.\nTo: be or not to be\n-- \nAnn\n3 > 2"
    assert clean("enron", text) == "\n".join(map(str.rstrip, text.split("\n")))


def test_enron_csv_of_raw_mails(tmp_path):
    with open(tmp_path / "emails.csv", "w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["file", "message"])
        for reply in REPLIES:
            writer.writerow(
                ["allen-p/sent/1.", (HEADERS + OWN).replace("\r\n", "\n") + f"\n\n{reply}"]
            )
    assert read(tmp_path / "emails.csv", "enron") == [OWN] * len(REPLIES)


def test_enron_maildir(tmp_path):
    inbox = tmp_path / "maildir" / "allen-p" / "inbox"
    inbox.mkdir(parents=True)
    (inbox / "1.").write_bytes((HEADERS + OWN.replace("\n", "\r\n")).encode())
    (inbox / "2.").write_bytes((HEADERS + "caf").encode() + b"\xe9 \x96 now")  # Windows' Latin-1
    quoted = HEADERS.replace("7bit", "quoted-printable") + "one =\r\nline =3D this\r\n"
    (inbox / "3_").write_bytes(quoted.encode())
    (inbox / "4.").write_bytes(b"no headers at all")
    (inbox / ".DS_Store").write_bytes(b"\0")
    assert read(tmp_path / "maildir", "enron") == [
        OWN,
        "café – now",
        "one line = this",
        "no headers at all",
    ]


def test_enron_mail_of_several_parts(tmp_path):
    mail = email.message.EmailMessage()
    mail["Subject"] = "pictures"
    mail.set_content("see this: ü\n")
    mail.add_alternative("<b>see</b>", subtype="html")
    mail.add_attachment(b"\0\1", maintype="image", subtype="png")
    (tmp_path / "1.").write_bytes(mail.as_bytes())
    assert read(tmp_path, "enron") == ["see this: ü"]


def test_enron_of_unknown_charset(tmp_path):
    (tmp_path / "1.").write_bytes(HEADERS.replace("us-ascii", "x-none").encode() + b"text \xff")
    assert read(tmp_path, "enron") == ["text ÿ"]


# ---------------------------------------------------------------- encyclopedia and web


def test_wikipedia_gives_the_same_from_both_formats(tmp_path):
    body = "Achilles (, ; ) was a hero (; born 3 BC).<onlyinclude>\n\n\n\nHe (the hero) did `f(x)`.  \n\n"
    cleaned = "Achilles\n\nAchilles was a hero (born 3 BC).\n\nHe (the hero) did `f(x)`."
    (tmp_path / "AA").mkdir()
    (tmp_path / "AA" / "wiki_00").write_text(
        json.dumps({"id": "1", "title": "Achilles", "text": f"Achilles\n\n{body}"})
        + "\n"
        + json.dumps({"id": "2", "title": "Redirect", "text": ""})
        + "\n"
        + json.dumps({"url": "u", "title": "Achilles", "text": body})
    )
    assert read(tmp_path, "wikipedia") == [cleaned, cleaned]


def test_wikitext_rows_and_files_are_the_same(tmp_path):
    lines = [" = One = \n", "\n", " It is 0 @.@ 7 m @-@ long . \n", " = = Part = = \n", "\n"]
    lines += [" More . \n", "\n", "\n", " = Two = \n", "\n", " x = y = z \n"]
    (tmp_path / "wiki.test.raw").write_text("".join(lines))
    hub = [line if line.strip() else "" for line in lines]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in hub))
    expected = [
        "= One =\n\nIt is 0.7 m-long .\n= = Part = =\n\nMore .",
        "= Two =\n\nx = y = z",
    ]
    assert read(tmp_path / "wiki.test.raw", "wikitext") == expected
    assert read(tmp_path / "a.jsonl", "wikitext") == expected


@pytest.mark.parametrize("corpus", ["openwebtext", "fineweb-edu"])
def test_web_text(tmp_path, corpus):
    (tmp_path / "a.jsonl").write_text('{"text": "\\r\\n a\\r\\nb\\u0000 ", "score": 3.1}\n')
    assert read(tmp_path / "a.jsonl", corpus) == ["a\nb"]


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """A module ``datasets`` that knows one dataset, and the list of what was asked of it."""
    calls, rows = [], []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))

        def stream():
            for row in rows:
                if isinstance(row, Exception):
                    raise row
                yield row

        return stream()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls, rows


def test_any_dataset_of_the_hub(hub):
    calls, rows = hub
    rows += [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]
    for address in ("hf://owner/name", "hf://datasets/owner/name"):
        assert read(address, "text") == ["one", "two"]
    assert read("hf://owner/name/en/validation", "text") == ["one", "two"]
    assert calls[1:] == [
        ("owner/name", None, "train", True),
        ("owner/name", "en", "validation", True),
    ]


@pytest.mark.parametrize(
    ("corpus", "name", "config", "column"),
    [
        ("gutenberg", "sedthh/gutenberg_english", None, "TEXT"),
        ("cnn", "abisee/cnn_dailymail", "3.0.0", "article"),
        ("enron", "Yale-LILY/aeslc", None, "email_body"),
        ("openwebtext", "Skylion007/openwebtext", None, "text"),
        ("wikipedia", "wikimedia/wikipedia", "20231101.en", "text"),
        ("wikitext", "Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
        ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    ],
)
def test_corpora_without_a_path_come_from_the_hub(hub, corpus, name, config, column):
    calls, rows = hub
    rows.append({"other": 7, column: "A text."})
    documents = list(read_documents(DataConfig(corpus=corpus), None))
    assert [document.text for document in documents] == ["A text."]
    assert calls == [(name, config, "train", True)]


def test_hub_failures_name_the_row(hub):
    calls, rows = hub
    rows += [{"text": "one"}, ConnectionError("reset by peer")]
    with pytest.raises(
        UserError, match=r"hf://a/b: row 2 could not be read \(ConnectionError: reset"
    ):
        read("hf://a/b", "text")
    rows[:] = [{"x": 1, "y": 2}]
    with pytest.raises(UserError, match="hf://a/b: no column text"):
        read("hf://a/b", "text")
    for address in ("hf://name", "hf://a/b/c/d/e", "hf://a//b"):
        with pytest.raises(UserError, match="not hf://OWNER/NAME"):
            read(address, "text")


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'almostgpt\[data\]'"):
        read("hf://a/b", "text")


def test_real_streams_of_datasets(tmp_path, monkeypatch):
    """What the library itself hands out, from local files in place of the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.jsonl").write_text(
        '{"title": "T", "text": "one"}\n{"title": "U", "text": "two"}\n'
    )
    load_dataset = datasets.load_dataset

    def local(name, config, **options):
        return load_dataset("json", data_files=str(tmp_path / "a.jsonl"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert read("hf://a/b", "wikipedia") == ["T\n\none", "U\n\ntwo"]
