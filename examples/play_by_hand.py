"""Plays one problem by hand, as a gymnasium environment: run ``python examples/play_by_hand.py`` and type."""

import gymnasium

import opd_env  # noqa: F401  (registers the environment)


def main() -> None:
    """Asks for turns until the episode is over. A turn without a tool call is the final answer."""
    env = gymnasium.make("opd_env/ToolUse-v0", task="arithmetic", tools=["calculator"])
    observation, _ = env.reset()
    print(observation)
    print('Call a tool: <tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>')
    over = False
    while not over:
        observation, reward, terminated, truncated, info = env.step(input("> "))
        over = terminated or truncated
        if observation:
            print(observation)
    print(f"reward {reward}, ended by {info['stop_reason']}; {info['grade'].reason or 'correct'}")


if __name__ == "__main__":
    main()
