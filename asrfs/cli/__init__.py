"""The program `asrfs`: one file a verb. Parses, asks `daemon/`, renders; decides nothing."""
