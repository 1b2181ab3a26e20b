"""What a graph's state was after each superstep, by its hash."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agentops.store.kinds import NUMBER, WORD

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("root_id", WORD, primary_key=True),
        sa.Column("place", NUMBER, primary_key=True),
        sa.Column("run_id", WORD, nullable=False),
        sa.Column("graph", WORD, nullable=False),
        sa.Column("step", NUMBER, nullable=False),
        sa.Column("source", WORD, nullable=False),
        sa.Column("hash", WORD, nullable=False),
        sa.Column("ns", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_checkpoint_run", "checkpoint", ["run_id", "root_id", "place"])


def downgrade() -> None:
    op.drop_table("checkpoint")
