"""Runs that stay whatever the rule of retention says."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agentops.store.kinds import WORD

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pin",
        sa.Column("run_id", WORD, primary_key=True),
        sa.Column("ns", sa.BigInteger(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("pin")
