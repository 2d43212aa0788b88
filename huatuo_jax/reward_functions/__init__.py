"""Rewards by rule: functions of prompts and responses that PPO takes beside a reward model."""
