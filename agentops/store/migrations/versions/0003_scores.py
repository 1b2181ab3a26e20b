"""Scores of runs, and experiments with their cases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agentops.store.kinds import NUMBER, TEXT, WORD

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "score",
        sa.Column("id", WORD, primary_key=True),
        sa.Column("run_id", WORD, nullable=False),
        sa.Column("span_id", WORD, nullable=True),
        sa.Column("experiment_id", WORD, nullable=True),
        sa.Column("case_id", WORD, nullable=True),
        sa.Column("name", WORD, nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("reason", WORD, nullable=False),
        sa.Column("source", WORD, nullable=False),
        sa.Column("judged", WORD, nullable=False),
        sa.Column("author", WORD, nullable=False),
        sa.Column("comment", TEXT, nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_score_run_id", "score", ["run_id"])
    op.create_index("ix_score_experiment_id", "score", ["experiment_id"])
    op.create_index("ix_score_name", "score", ["name", "created_ns"])
    op.create_table(
        "experiment",
        sa.Column("id", WORD, primary_key=True),
        sa.Column("name", WORD, nullable=False),
        sa.Column("dataset", WORD, nullable=False),
        sa.Column("dataset_hash", WORD, nullable=False),
        sa.Column("graph", WORD, nullable=False),
        sa.Column("status", WORD, nullable=False),
        sa.Column("cases", NUMBER, nullable=False),
        sa.Column("started_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("pid", NUMBER, nullable=False),
        sa.Column("segment", WORD, nullable=False),
        sa.Column("error", TEXT, nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
    )
    op.create_index("ix_experiment_started", "experiment", ["started_ns", "id"])
    op.create_table(
        "experiment_case",
        sa.Column("experiment_id", WORD, primary_key=True),
        sa.Column("case_id", WORD, primary_key=True),
        sa.Column("place", NUMBER, nullable=False),
        sa.Column("run_id", WORD, nullable=True),
        sa.Column("status", WORD, nullable=False),
        sa.Column("error", TEXT, nullable=True),
    )
    op.create_index("ix_experiment_case_run_id", "experiment_case", ["run_id"])


def downgrade() -> None:
    op.drop_table("experiment_case")
    op.drop_table("experiment")
    op.drop_table("score")
