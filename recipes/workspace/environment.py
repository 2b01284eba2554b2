"""The environment of the workspace task: a company in an SQLite database, with four tools."""

import json
import sqlite3

from trl_toolgrpo.types import JSONObject, JSONValue


class WorkspaceEnvironment:
    """
    A company of a few people in an SQLite database, which is opened for each rollout.

    Only the environment's own methods use the connection; they all run on the rollout's thread. What a reward function
    needs is in plain attributes.

    Args:
        turn_rewards (`bool`, *optional*, defaults to `False`):
            Reward each dependent call in the turn that makes it.

    Attributes:
        calls (`list[tuple[str, dict]]`):
            Name and arguments of every call that succeeded, in order.
        rewarded (`float`):
            Sum of the rewards of the turns so far.
        turn_reward (`float`, *optional*):
            Reward of the current turn; the trainer reads and resets it.
        outbox (`list[tuple[str, str]]`):
            Recipient and text of every Slack message, read back from the database after each one is sent.
    """

    def __init__(self, turn_rewards: bool = False) -> None:
        self.calls: list[tuple[str, JSONObject]] = []
        self.outbox: list[tuple[str, str]] = []
        self.rewarded = 0.0
        self.turn_reward: float | None = None
        self._turn_rewards = turn_rewards
        self._plan: list[list[JSONValue]] = []
        self._database: sqlite3.Connection | None = None

    def reset(self, employees: list[JSONObject], plan: str = "[]", **row: object) -> None:
        """
        Open a fresh database that holds the given people.

        Args:
            employees (`list[dict]`):
                One record per person: `employee_id`, `name`, `salary`, `manager_id`.
            plan (`str`, *optional*):
                JSON text of the dependent calls, in order, for rewards of turns.
            row (`dict`):
                The other columns of the data set, which are ignored.
        """
        self.calls, self.outbox = [], []
        self.rewarded, self.turn_reward = 0.0, None
        self._plan = json.loads(plan)
        self._database = sqlite3.connect(":memory:")
        self._database.executescript(
            """
            CREATE TABLE employees (
                employee_id INTEGER PRIMARY KEY,
                name TEXT NOT NULL UNIQUE,
                salary INTEGER NOT NULL,
                manager_id INTEGER NOT NULL
            );
            CREATE TABLE messages (
                message_id INTEGER PRIMARY KEY,
                recipient_id INTEGER NOT NULL REFERENCES employees (employee_id),
                text TEXT NOT NULL
            );
            """
        )
        self._database.executemany(
            "INSERT INTO employees VALUES (:employee_id, :name, :salary, :manager_id)", employees
        )

    def _one(self, query: str, argument: object, missing: str) -> tuple:
        if self._database is None:
            raise RuntimeError("The workspace has no database yet. Call reset() first.")
        row = self._database.execute(query, (argument,)).fetchone()
        if row is None:
            raise LookupError(missing)
        return row

    def _record(self, name: str, /, **arguments: JSONValue) -> None:
        """Record a call that succeeded, and reward it if it is the next dependent call."""
        self.calls.append((name, arguments))
        earned = progress(self.calls, self._plan) - self.rewarded if self._turn_rewards and self._plan else 0.0
        if earned:
            self.rewarded += earned
            self.turn_reward = (self.turn_reward or 0.0) + earned

    def find_employee(self, name: str) -> dict:
        """
        Look up an employee by name.

        Args:
            name: Full name.
        """
        (employee_id,) = self._one(
            "SELECT employee_id FROM employees WHERE name = ?", name, f"no employee is named {name!r}"
        )
        self._record("find_employee", name=name)
        return {"employee_id": employee_id}

    def get_salary(self, employee_id: int) -> dict:
        """
        Get the salary of an employee.

        Args:
            employee_id: Employee id.
        """
        (salary,) = self._one(
            "SELECT salary FROM employees WHERE employee_id = ?", employee_id, f"no employee has id {employee_id}"
        )
        self._record("get_salary", employee_id=employee_id)
        return {"salary": salary}

    def get_manager(self, employee_id: int) -> dict:
        """
        Get the manager of an employee.

        Args:
            employee_id: Employee id.
        """
        manager_id, name = self._one(
            "SELECT boss.employee_id, boss.name FROM employees AS report "
            "JOIN employees AS boss ON boss.employee_id = report.manager_id WHERE report.employee_id = ?",
            employee_id,
            f"no employee has id {employee_id}",
        )
        self._record("get_manager", employee_id=employee_id)
        return {"manager_id": manager_id, "name": name}

    def send_slack_message(self, recipient: str, text: str) -> dict:
        """
        Send a Slack message.

        Args:
            recipient: Full name.
            text: Message.
        """
        (recipient_id,) = self._one(
            "SELECT employee_id FROM employees WHERE name = ?", recipient, f"no employee is named {recipient!r}"
        )
        self._database.execute("INSERT INTO messages (recipient_id, text) VALUES (?, ?)", (recipient_id, text))
        self.outbox = self._database.execute(
            "SELECT name, text FROM messages JOIN employees ON employee_id = recipient_id ORDER BY message_id"
        ).fetchall()
        self._record("send_slack_message", recipient=recipient, text=text)
        return {"sent": True}


def progress(calls: list[tuple[str, JSONObject]], plan: list[list[JSONValue]]) -> float:
    """
    Return half the share of the dependent calls that were made in order.

    Args:
        calls (`list[tuple[str, dict]]`):
            Calls made.
        plan (`list[list]`):
            Name and arguments of each dependent call, at least one.

    Returns:
        `float`: from 0 to 0.5.
    """
    done = 0
    for name, arguments in calls:
        if done < len(plan) and [name, arguments] == plan[done]:
            done += 1
    return 0.5 * done / len(plan)
