"""This package has the parts of eval.py: problems (benchmarks, multiple_choice), the output folder, report and
statistics. try_model.py is the command of sample.py."""
