"""When what is kept of a run was told: what was told before it and comes later, from another home, changes nothing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("run", sa.Column("told_ns", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("run", "told_ns")
