"""The old place of `nexus.integrations.lightning`."""

from nexus.integrations.lightning import LearningRateMonitor as LearningRateMonitor
