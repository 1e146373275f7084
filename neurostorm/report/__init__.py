"""What a sweep found, from MLflow alone: tables, figures and one page of HTML.

collect (MLflow -> results) -> compare (statistics) -> tables, figures -> page -> summary (the whole job, and its files)
"""
