"""The first schema: threads, runs, spans, payloads, prompt versions, journal positions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agentops.store.kinds import NUMBER, TEXT, WORD

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "journal_position",
        sa.Column("segment", WORD, nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("lost", NUMBER, nullable=False),
        sa.PrimaryKeyConstraint("segment"),
    )
    op.create_table(
        "payload",
        sa.Column("hash", WORD, nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("size", NUMBER, nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("hash"),
    )
    op.create_table(
        "prompt_version",
        sa.Column("version", WORD, nullable=False),
        sa.Column("name", WORD, nullable=False),
        sa.Column("template", TEXT, nullable=False),
        sa.Column("first_seen_ns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version", "name"),
    )
    op.create_table(
        "run",
        sa.Column("id", WORD, nullable=False),
        sa.Column("thread_id", WORD, nullable=False),
        sa.Column("graph", WORD, nullable=False),
        sa.Column("status", WORD, nullable=False),
        sa.Column("started_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("input_hash", WORD, nullable=True),
        sa.Column("output_hash", WORD, nullable=True),
        sa.Column("error", TEXT, nullable=True),
        sa.Column("pid", NUMBER, nullable=False),
        sa.Column("segment", WORD, nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("input_tokens", NUMBER, nullable=False),
        sa.Column("output_tokens", NUMBER, nullable=False),
        sa.Column("cached_tokens", NUMBER, nullable=False),
        sa.Column("computed_tokens", NUMBER, nullable=False),
        sa.Column("trimmed_tokens", NUMBER, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_run_graph"), "run", ["graph"], unique=False)
    op.create_index("ix_run_started", "run", ["started_ns", "id"], unique=False)
    op.create_index("ix_run_status", "run", ["status"], unique=False)
    op.create_index(op.f("ix_run_thread_id"), "run", ["thread_id"], unique=False)
    op.create_table(
        "span",
        sa.Column("id", WORD, nullable=False),
        sa.Column("run_id", WORD, nullable=False),
        sa.Column("root_id", WORD, nullable=False),
        sa.Column("parent_id", WORD, nullable=True),
        sa.Column("seq", NUMBER, nullable=False),
        sa.Column("kind", WORD, nullable=False),
        sa.Column("name", WORD, nullable=False),
        sa.Column("status", WORD, nullable=False),
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        sa.Column("duration_ns", sa.BigInteger(), nullable=True),
        sa.Column("segment", WORD, nullable=False),
        sa.Column("node", WORD, nullable=True),
        sa.Column("step", NUMBER, nullable=True),
        sa.Column("task", WORD, nullable=True),
        sa.Column("checkpoint_ns", WORD, nullable=True),
        sa.Column("attempt", NUMBER, nullable=True),
        sa.Column("input_hash", WORD, nullable=True),
        sa.Column("output_hash", WORD, nullable=True),
        sa.Column("error", TEXT, nullable=True),
        sa.Column("model", WORD, nullable=True),
        sa.Column("prompt_name", WORD, nullable=True),
        sa.Column("prompt_version", WORD, nullable=True),
        sa.Column("input_tokens", NUMBER, nullable=False),
        sa.Column("output_tokens", NUMBER, nullable=False),
        sa.Column("cached_tokens", NUMBER, nullable=False),
        sa.Column("computed_tokens", NUMBER, nullable=False),
        sa.Column("trimmed_tokens", NUMBER, nullable=False),
        sa.Column("queue_ms", sa.Float(), nullable=False),
        sa.Column("prefill_ms", sa.Float(), nullable=False),
        sa.Column("decode_ms", sa.Float(), nullable=False),
        sa.Column("first_token_ms", sa.Float(), nullable=False),
        sa.Column("attributes", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_span_run", "span", ["run_id", "root_id", "seq"], unique=False)
    op.create_index("ix_span_status", "span", ["status"], unique=False)
    op.create_table(
        "thread",
        sa.Column("id", WORD, nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("last_ns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    if op.get_bind().dialect.name == "postgresql":
        # SQLite numbers the rows of every table by itself, in the order in which they come.
        for name in ("run", "span"):
            op.add_column(name, sa.Column("rowid", sa.BigInteger(), sa.Identity(always=True), nullable=False))
            op.create_index(f"ix_{name}_rowid", name, ["rowid"], unique=True)


def downgrade() -> None:

    op.drop_table("thread")
    op.drop_index("ix_span_status", table_name="span")
    op.drop_index("ix_span_run", table_name="span")
    op.drop_table("span")
    op.drop_index(op.f("ix_run_thread_id"), table_name="run")
    op.drop_index("ix_run_status", table_name="run")
    op.drop_index("ix_run_started", table_name="run")
    op.drop_index(op.f("ix_run_graph"), table_name="run")
    op.drop_table("run")
    op.drop_table("prompt_version")
    op.drop_table("payload")
    op.drop_table("journal_position")
