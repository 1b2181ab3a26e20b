"""Column types that mean the same in SQLite and in Postgres: text is ordered byte by byte, whole numbers have 64 bits."""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, String, Text

NUMBER = Integer().with_variant(BigInteger(), "postgresql")
WORD = String().with_variant(String(collation="C"), "postgresql")
TEXT = Text().with_variant(Text(collation="C"), "postgresql")
